import io
import json
from dataclasses import replace

import numpy as np
import pytest

from prefgen.data.embeddings import EmbeddingReader, EmbeddingWriter, check_lineage, from_npy, to_npy
from prefgen.data.verify import inspect, verify
from prefgen.errors import CheckpointError, DataError
from prefgen.testing.data import make_embeddings


@pytest.fixture
def user(tmp_path):
    return EmbeddingReader(make_embeddings(tmp_path / "source", num_users=4), split="train")[0]


def test_round_trip_is_exact(tmp_path, user):
    with EmbeddingWriter(tmp_path / "out", header={"mllm": "sha256:1", "layers": [3, 4]}) as writer:
        writer.add(user, split="test")
        writer.close()
    reader = EmbeddingReader(tmp_path / "out", split="test")
    assert reader.header == {"mllm": "sha256:1", "layers": [3, 4]}
    found = reader[0]
    for name in ("core", "sem", "core_negative", "sem_negative", "image"):
        assert np.array_equal(getattr(found, name), getattr(user, name))
        assert getattr(found, name).dtype == np.float32
    for name in ("user_id", "key", "reference_keys", "image_keys", "prompts", "liked_attributes"):
        assert getattr(found, name) == getattr(user, name)
    assert verify(tmp_path / "out", num_workers=1).problems == ()
    assert inspect(tmp_path / "out").header["layers"] == [3, 4]


def test_targets_lie_outside_a_draw(user):
    for draw, references in enumerate(user.reference_keys):
        rows = user.rows_outside(draw)
        assert rows
        assert all(user.image_keys[row] not in references for row in rows)
        assert all("/liked." in user.image_keys[row] for row in rows)
        liked = [key for key in user.image_keys if "/liked." in key]
        assert len(rows) == len(liked) - sum("/liked." in key for key in references)


def test_without_close_there_is_no_set(tmp_path, user):
    with EmbeddingWriter(tmp_path / "out", header={}) as writer:
        writer.add(user, split="train")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: {"core": u.core[:1]}, r"core must be float32 of shape \(3, D\), got float32 \(1, 8\)"),
        (lambda u: {"sem": u.sem.astype(np.float64)}, "sem must be float32"),
        (lambda u: {"image": u.image * np.float32("nan")}, "image holds NaN"),
        (lambda u: {"core_negative": u.core_negative[:, :2]}, "core and core_negative differ in shape"),
        (lambda u: {"prompts": ("one",)}, "1 prompts for 20 images"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, user, change, message):
    with (
        EmbeddingWriter(tmp_path / "out", header={}) as writer,
        pytest.raises(DataError, match=message),
    ):
        writer.add(replace(user, **change(user)), split="train")


def test_widths_and_users_must_agree(tmp_path, user):
    narrow = replace(user, user_id="b", core=user.core[:, :2], core_negative=user.core_negative[:, :2])
    with EmbeddingWriter(tmp_path / "out", header={}) as writer:
        writer.add(user, split="train")
        with pytest.raises(DataError, match="core is 2 wide, earlier users 8"):
            writer.add(narrow, split="train")
        with pytest.raises(DataError, match="two users with the id"):
            writer.add(user, split="test")
    with pytest.raises(DataError, match="plain json"):
        EmbeddingWriter(tmp_path / "c", header={"path": tmp_path})


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


LIE = to_npy(np.zeros((2, 2))).replace(b"(2, 2), }  ", b"(2, 20000000)")


@pytest.mark.parametrize(
    "data",
    [
        npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        npy(np.zeros(3)),
        b"",
        b"PK\x03\x04" + b"0" * 60,
        to_npy(np.zeros((4, 4)))[:-8],
        LIE,
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.",
    ],
    ids=["object", "float64", "empty", "zip", "short", "lie", "header", "pickle"],
)
def test_hostile_arrays(data):
    with pytest.raises(DataError, match="^here: ") as caught:
        from_npy(data, where="here")
    assert "\n" not in str(caught.value)


def test_lineage():
    header = {"mllm": "sha256:1", "lora": "sha256:2", "layers": [1]}
    check_lineage(header, expected={"mllm": "sha256:1", "layers": [1]}, where="x")
    with pytest.raises(CheckpointError) as caught:
        check_lineage(
            header, expected={"lora": "sha256:3", "probe": "p"}, where="work/embeddings", mend="rerun"
        )
    assert str(caught.value) == (
        "work/embeddings: made by other models: lora is 'sha256:2' but 'sha256:3' is expected; "
        "probe is 'not recorded' but 'p' is expected; rerun"
    )


def test_a_damaged_set_is_found(tmp_path):
    folder = make_embeddings(tmp_path, num_users=8)
    path = folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    start = data.index(b"NUMPY") - 1
    data[start : start + 6] = b"\x80PICKL"
    path.write_bytes(data)
    with pytest.raises(DataError, match="not a plain npy array"):
        EmbeddingReader(folder, split="train")[0]
    assert EmbeddingReader(folder, split="train", on_bad="skip")[0] is None
    assert len(verify(folder, num_workers=1).problems) == 2
    assert json.loads((folder / "index.json").read_text())["kind"] == "embeddings"
