"""Small sources in each real layout, and importing them in small groups."""

import copyreg
import io
import json
import pickle
import sys
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

from prefgen.data.sources import importing
from prefgen.data.sources.catalogue import open_source


class Crash(BaseException):
    """A kill, as far as the code can tell: nothing may catch it."""


def picture(number, *, size=48, encoding="PNG", quality=90, tint=None):
    """Encoded blobs of colour: every number looks like nothing else."""
    blobs = np.random.default_rng(number).integers(0, 256, size=(6, 6, 3)).astype(np.uint8)
    image = Image.fromarray(blobs).resize((size, size), Image.Resampling.BICUBIC)
    if tint is not None:
        image = Image.merge("RGB", [image.getchannel(channel) for channel in tint])
    buffer = io.BytesIO()
    image.save(buffer, encoding, **({"quality": quality} if encoding != "PNG" else {}))
    return buffer.getvalue()


def run(name, path, out, **options):
    opened = open_source(name, path=path)
    plan = importing.ImportPlan(**{"min_judgements": 1, "num_workers": 1, "licence": "CC0", **options})
    return importing.run_import(opened, out=out, plan=plan)


def bytes_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def histories(out):
    lines = (out / "history.jsonl").read_text().splitlines()
    return {record["user_id"]: record for record in map(json.loads, lines)}


def images(out, record, side):
    """Bytes behind one side."""
    return [(out / item["image"]).read_bytes() for item in record[side]]


def make_folder(root):
    for user in range(4):
        for side in ("liked", "disliked"):
            (root / f"p{user}" / side).mkdir(parents=True)
            for i in range(3):
                data = picture(100 * user + 10 * (side == "liked") + i)
                (root / f"p{user}" / side / f"{i}.png").write_bytes(data)
    (root / "p0" / "prompts.csv").write_text("image,prompt\nliked/0.png,a fox\n1.png,a boat\n")
    (root / "prompts.csv").write_text("image,prompt\np1/disliked/2.png,a tower\n")
    return root


def make_table(root, *, suffix="csv"):
    (root / "pics").mkdir(parents=True)
    rows = []
    for i in range(12):
        (root / "pics" / f"{i}.png").write_bytes(picture(i))
        # Users come interleaved.
        rows.append((f"u{i % 3}", f"pics/{i}.png", "yes" if i % 2 else "0", f"prompt, {i}"))
    names = ("user_id", "image", "liked", "prompt")
    path = root / f"judged.{suffix}"
    if suffix == "csv":
        lines = [",".join(names)] + [f'{user},{image},{liked},"{text}"' for user, image, liked, text in rows]
    else:
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_pipbench(root):
    (root / "images").mkdir(parents=True)
    records = []
    for i in range(3):
        names = [f"images/{i}-{k}.webp" for k in range(4)]
        for k, name in enumerate(names):
            (root / name).write_bytes(picture(10 * i + k, encoding="WEBP"))
        records.append(
            {
                "id": i,
                "image_id": f"x{i}",
                "category": "animals",
                "prompt": f"cat {i}",
                "ref_images": names[:3],
            }
            | {"gt_images": names[3]}
        )
    (root / "metadata.json").write_text(json.dumps(records, indent=1))
    return root


def make_prefbench(root, *, extra=(), num_parts=None):
    """Both halves, two records a user, as written by `tar -C NAME -cf - . | split`."""
    for folder in ("json", "pkl"):
        (root / folder).mkdir(parents=True)
    for half, (name, parts) in enumerate((("diffusiondb", 6), ("coco", 4))):
        records, tastes, members = [], {}, {}
        for user in range(3):
            pairs = []
            for record in range(2):
                base = 1000 * half + 100 * user + 10 * record
                files = [f"{base + k:07d}_{'x' * 110 if k == 0 else '0'}.png" for k in range(5)]
                members |= {file: picture(base + k) for k, file in enumerate(files)}
                paths = [f"{name}/{file}" for file in files]
                records.append(
                    {"id": str(user), "image_file": paths[4], "text": f"target {base}"}
                    | {"positive_img": paths[:2], "negative_img": paths[2:4], "prompt_list": ["one", "two"]}
                )
                pairs += [(files[2], files[0], "one"), (files[3], files[1], "two")]
            tastes[str(user)] = [*pairs, [["grey", f"dull {user}"], ["Pop Art", f"red {user}"]]]
        (root / "json" / f"{name}.json").write_text(json.dumps(records))
        (root / "pkl" / f"{name}.pkl").write_bytes(pickle.dumps(tastes))
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
            folder = tarfile.TarInfo("./")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for file, data in {**members, "unused.png": picture(9)}.items():
                info = tarfile.TarInfo(f"./{file}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            for info in extra:
                tar.addfile(info, io.BytesIO(b"x" * info.size))
        data = buffer.getvalue()
        cuts = [len(data) * i // parts for i in range(parts + 1)]
        for i in range(parts):
            (root / f"{name}.tar.part-{'a' + chr(97 + i)}").write_bytes(data[cuts[i] : cuts[i + 1]])
    return root


def make_pickapic(root, *, version=2):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    (root / "data").mkdir(parents=True)
    labels = [(1, 0), (0, 1), (0.5, 0.5), (1, 0), (0, 1)]
    for part in range(2):
        rows = []
        for i in range(10):
            number = 100 * part + 2 * i
            rows.append(
                {"user_id": i % 4, "caption": f"prompt {number}", "ranking_id": number, "has_label": i != 8}
                | {f"jpg_{k}": picture(number + k, encoding="JPEG") for k in (0, 1)}
                | {f"label_{k}": float(labels[i % 5][k]) for k in (0, 1)}
                | {f"model_{k}": "sd" for k in (0, 1)}
                | ({"are_different": True} if version == 2 else {})
            )
        rows[9]["jpg_1"] = None
        path = root / "data" / f"train-{part:05d}-of-00002-0a1b.parquet"
        parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=4)
    return root


def frame_rows(part):
    """Rows of learn-user-pref: the user's history is repeated in every row."""
    rows = []
    for i in range(4):
        user = 10 * part + i // 2
        pictures = [picture(100 * user + k, encoding="JPEG", size=64) for k in range(4)]
        rows.append(
            {"user_id": user, "reference_list": pictures[:2], "reference_list_bad": pictures[2:]}
            | {"reference_prompt_list": ["a fox", "a cup"], "prompt": f"query {i}", "label0": float(i % 2)}
            | {f"image{k}": picture(100 * user + 10 + 2 * i + k, encoding="JPEG", size=64) for k in (0, 1)}
        )
    return rows


def pickled_frame(rows, monkeypatch, *, layout="blocks"):
    """What pandas pickles, made without pandas: stand-ins under its names, then numpy's own pickles."""

    def module(name, **members):
        made = types.ModuleType(name)
        for key, member in members.items():
            member.__module__, member.__qualname__ = name, key
            setattr(made, key, member)
        monkeypatch.setitem(sys.modules, name, made)

    class State:
        def __init__(self, state=None):
            self.state = state

        def __reduce__(self):
            return copyreg.__newobj__, (type(self),), self.state

    frame, manager, index = (type(name, (State,), {}) for name in ("DataFrame", "BlockManager", "Index"))

    class Call:
        def __init__(self, function, *args):
            self.call = (function, args)

        def __reduce__(self):
            return self.call

    def _unpickle_block(values, placement, ndim):
        raise AssertionError

    def _new_Index(cls, state):
        raise AssertionError

    for parent in ("pandas", "pandas.core", "pandas.core.internals", "pandas.core.indexes", "pandas._libs"):
        module(parent)
    module("pandas.core.frame", DataFrame=frame)
    module("pandas.core.internals.managers", BlockManager=manager)
    module("pandas.core.indexes.base", Index=index, _new_Index=_new_Index)
    module("pandas._libs.internals", _unpickle_block=_unpickle_block)
    names = list(rows[0])

    def objects(values, shape):
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return array.reshape(shape)

    axis = Call(_new_Index, index, {"data": objects(names, (len(names),)), "name": None})
    other = Call(_new_Index, index, {"name": None, "start": 0, "stop": len(rows), "step": 1})
    numbers = [name for name in names if name in ("user_id", "label0")]
    if layout == "scalars":  # a column of objects that are numpy's numbers
        numbers = ["label0"]
        rows = [{**row, "user_id": np.int64(row["user_id"])} for row in rows]
    blocks = [(np.array([[row[name] for row in rows]]), slice(names.index(name), names.index(name) + 1, 1))
              for name in numbers]  # fmt: skip
    rest = [name for name in names if name not in numbers]
    values = objects([row[name] for name in rest for row in rows], (len(rest), len(rows)))
    blocks.append((values, np.array([names.index(name) for name in rest])))
    if layout != "0.14.1":
        made = Call(manager, tuple(Call(_unpickle_block, v, p, 2) for v, p in blocks), [axis, other])
    else:
        state = {"axes": [axis, other], "blocks": [{"values": v, "mgr_locs": p} for v, p in blocks]}
        made = manager(([], [], [], {"0.14.1": state}))
    return pickle.dumps(frame({"_mgr": made, "_typ": "dataframe", "attrs": {}}), protocol=4)


def make_learn_user_pref(root, monkeypatch, *, layout="blocks"):
    root.mkdir(parents=True)
    with monkeypatch.context() as patch:
        for part in range(2):
            data = pickled_frame(frame_rows(part), patch, layout=layout)
            (root / f"bench_train_w_bad_split_{part}.pkl").write_bytes(data)
    return root


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(importer) -> the path to give it."""
    makers = {
        "folder": make_folder,
        "table": make_table,
        "pipbench": make_pipbench,
        "prefbench": make_prefbench,
        "pickapic": make_pickapic,
        "learn-user-pref": lambda root, **options: make_learn_user_pref(root, monkeypatch, **options),
    }
    return lambda name, **options: makers[name](tmp_path / "source" / name, **options)


@pytest.fixture
def tools():
    """What the tests share, without importing this file by name."""
    return types.SimpleNamespace(
        Crash=Crash, picture=picture, run=run, bytes_of=bytes_of, histories=histories, images=images,
        frame_rows=frame_rows, pickled_frame=pickled_frame,
    )  # fmt: skip
