"""Every importer on a small source of its real layout: whose image, which side, which words."""

import json

import pytest

from prefgen.data.shards import assign_split, read_histories, write_shards
from prefgen.data.sources.catalogue import open_source
from prefgen.errors import DataError


def words(record, side):
    return [item.get("prompt", "") for item in record[side]]


def test_folder(tmp_path, make, tools):
    source = make("folder")
    report = tools.run("folder", source, tmp_path / "out").report
    found = tools.histories(tmp_path / "out")
    assert list(found) == ["p0", "p1", "p2", "p3"]
    for user, record in found.items():
        for side in ("liked", "disliked"):
            files = sorted((source / user / side).iterdir())
            assert tools.images(tmp_path / "out", record, side) == [file.read_bytes() for file in files]
        assert record["split"] == assign_split(user)
    assert words(found["p0"], "liked") == ["a fox", "a boat", ""]
    assert words(found["p0"], "disliked") == ["", "a boat", ""]
    assert words(found["p1"], "disliked") == ["", "", "a tower"]
    assert report["kept"]["users"] == 4
    assert [file["name"] for file in report["files"]] == ["p0/prompts.csv", "prompts.csv"]
    assert "| all | 4 | 12 | 12 |" in (tmp_path / "out" / "card.md").read_text()


def test_a_folder_of_one_person_is_named_after_it(tmp_path, make, tools):
    source = make("folder") / "p2"
    (source / "liked" / ".DS_Store").write_bytes(b"x")
    report = tools.run("folder", source, tmp_path / "out").report
    assert list(tools.histories(tmp_path / "out")) == ["p2"]
    assert report["read"]["judgements"] == 6


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_table(tmp_path, make, tools, suffix):
    tools.run("table", make("table", suffix=suffix), tmp_path / "out")
    found = tools.histories(tmp_path / "out")
    assert list(found) == ["u0", "u1", "u2"]
    assert words(found["u1"], "liked") == ["prompt, 1", "prompt, 7"]
    assert tools.images(tmp_path / "out", found["u1"], "disliked") == [tools.picture(4), tools.picture(10)]


def test_what_was_imported_can_be_packed(tmp_path, make, tools):
    tools.run("table", make("table"), tmp_path / "out", fractions=(0.5, 0.25, 0.25))
    history = tmp_path / "out" / "history.jsonl"
    index = write_shards(read_histories(history), root=history.parent, out=tmp_path / "shards")
    users = {split: index.counts(split).users for split in index.splits}
    assert sum(users.values()) == 3
    assert set(users) == {assign_split(f"u{i}", fractions=(0.5, 0.25, 0.25)) for i in range(3)}


def test_pipbench(tmp_path, make, tools):
    report = tools.run("pipbench", make("pipbench"), tmp_path / "out").report
    found = tools.histories(tmp_path / "out")
    assert words(found["1"], "liked") == ["", "", "", "cat 1"]
    assert found["1"]["disliked"] == []
    assert found["1"]["source"] == "human"
    assert report["kept"]["liked"] == 12
    assert all(path.suffix == ".webp" for path in (tmp_path / "out" / "images").glob("*/*"))


def test_prefbench(tmp_path, make, tools):
    report = tools.run("prefbench", make("prefbench"), tmp_path / "out").report
    found = tools.histories(tmp_path / "out")
    assert list(found) == [f"{name}-{user}" for name in ("diffusiondb", "coco") for user in range(3)]
    user = found["coco-1"]
    assert user["source"] == "agent"
    numbers = [1100, 1101, 1104, 1110, 1111, 1114]
    assert tools.images(tmp_path / "out", user, "liked") == [tools.picture(n) for n in numbers]
    numbers = [1102, 1103, 1112, 1113]
    assert tools.images(tmp_path / "out", user, "disliked") == [tools.picture(n) for n in numbers]
    assert words(user, "liked") == ["one", "two", "target 1100", "one", "two", "target 1110"]
    assert user["liked_attributes"] == ["Pop Art", "red 1"]
    assert user["disliked_attributes"] == ["grey", "dull 1"]
    assert report["kept"]["images"] == 60  # the one nobody judged is not kept
    assert len(list((tmp_path / "out" / "images").glob("*/*"))) == 60
    assert len([file for file in report["files"] if ".tar.part-" in file["name"]]) == 10


@pytest.mark.slow
def test_prefbench_already_unpacked(tmp_path, make, tools):
    source = make("prefbench")
    tools.run("prefbench", source, tmp_path / "a")
    import tarfile

    for name in ("coco", "diffusiondb"):
        parts = sorted(source.glob(f"{name}.tar.part-*"))
        (source / "all.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
        with tarfile.open(source / "all.tar") as tar:
            tar.extractall(source / name, filter="data")
        for part in parts:
            part.unlink()
    tools.run("prefbench", source, tmp_path / "b")
    assert (tmp_path / "a" / "history.jsonl").read_bytes() == (tmp_path / "b" / "history.jsonl").read_bytes()


@pytest.mark.parametrize("which", [-1, 2])
def test_prefbench_with_a_part_missing(tmp_path, make, tools, which):
    source = make("prefbench")
    sorted(source.glob("diffusiondb.tar.part-*"))[which].unlink()
    with pytest.raises(DataError, match=r"diffusiondb\.tar \(5 parts\).*part"):
        tools.run("prefbench", source, tmp_path / "out")
    assert not (tmp_path / "out" / "history.jsonl").exists()


@pytest.mark.parametrize("version", [1, 2])
def test_pickapic(tmp_path, make, tools, version):
    report = tools.run("pickapic", make("pickapic", version=version), tmp_path / "out").report
    found = tools.histories(tmp_path / "out")
    assert list(found) == ["0", "1", "2", "3"]
    # User 0 has rows 0, 4 and 8 of each file: chosen 0, chosen 1, no label.
    numbers = [0, 9, 100, 109]
    expected = [tools.picture(n, encoding="JPEG") for n in numbers]
    assert tools.images(tmp_path / "out", found["0"], "liked") == expected
    assert words(found["0"], "disliked") == ["prompt 0", "prompt 8", "prompt 100", "prompt 108"]
    steps = {step["step"]: step for step in report["cleaning"]}
    assert steps["ties"]["judgements"] == 8
    assert steps["broken-images"]["reasons"] == {"missing": 2}
    assert report["skipped"] == {"pair without a label": 4}
    assert report["read"]["judgements"] == 36


def test_pickapic_reads_in_bounded_pieces(make):
    """Nothing but one record batch is alive: rows come lazily, from any place on."""
    section = open_source("pickapic", path=make("pickapic")).sections[0]
    whole = list(section.read(0, None))
    assert [batch.position for batch in whole] == list(range(1, 11))
    for start in range(10):
        assert list(section.read(start, None)) == whole[start:]


@pytest.mark.parametrize("layout", ["blocks", "0.14.1", "scalars"])
def test_learn_user_pref_without_pandas(tmp_path, make, tools, layout):
    report = tools.run("learn-user-pref", make("learn-user-pref", layout=layout), tmp_path / "out").report
    check_learn_user_pref(tmp_path / "out", report, tools)


def test_learn_user_pref_as_pandas_writes_it(tmp_path, tools):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    (tmp_path / "source").mkdir()
    for part in range(2):
        # The real files are older than pandas' own string columns.
        frame = pandas.DataFrame(tools.frame_rows(part)).astype({"prompt": object})
        frame.columns = frame.columns.astype(object)
        frame.to_pickle(tmp_path / "source" / f"bench_{part}.pkl")
    report = tools.run("learn-user-pref", tmp_path / "source", tmp_path / "out").report
    check_learn_user_pref(tmp_path / "out", report, tools)


def check_learn_user_pref(out, report, tools):
    found = tools.histories(out)
    assert list(found) == ["0", "1", "10", "11"]
    user = found["10"]
    numbers = [1000, 1001, 1011, 1012]
    expected = [tools.picture(n, encoding="JPEG", size=64) for n in numbers]
    assert tools.images(out, user, "liked") == expected
    assert words(user, "liked") == ["a fox", "a cup", "query 0", "query 1"]
    numbers = [1002, 1003, 1010, 1013]
    expected = [tools.picture(n, encoding="JPEG", size=64) for n in numbers]
    assert tools.images(out, user, "disliked") == expected
    steps = {step["step"]: step for step in report["cleaning"]}
    assert steps["exact-duplicates"]["judgements"] == 16


def test_images_of_a_frame_stay_on_disk(tmp_path, make, tools, monkeypatch):
    """Also its numbers, when they are many: every longer byte string of the pickle goes to the file."""
    from prefgen.data.sources import pickles
    from prefgen.data.sources.frames import PickledFrame

    monkeypatch.setattr(pickles, "SPILL_BYTES", 16)
    source = make("learn-user-pref")
    frame = PickledFrame(next(source.glob("*.pkl")), spill=tmp_path / "spill")
    assert all(isinstance(item, pickles.SpilledBytes) for item in frame._by_name["image0"])
    report = tools.run("learn-user-pref", source, tmp_path / "out").report
    check_learn_user_pref(tmp_path / "out", report, tools)


def test_report_names_files_and_checksums(tmp_path, make, tools):
    import hashlib

    source = make("table")
    report = tools.run("table", source, tmp_path / "out", command="prefgen data import x").report
    assert report == json.loads((tmp_path / "out" / "import.json").read_text())
    data = source.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert report["files"] == [{"name": "judged.csv", "bytes": len(data), "sha256": digest}]
    assert report["licence"] == "CC0"
    assert report["command"] == "prefgen data import x"
