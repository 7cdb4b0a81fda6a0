"""Workers and parts build the same bytes as one process; a merge takes whole sets only."""

import json

import pytest

from prefgen.data.index import INDEX_NAME, read_index
from prefgen.data.parts import PARTS_FOLDER, WHOLE, Part, merge_parts
from prefgen.data.shards import read_histories, write_shards
from prefgen.data.verify import verify
from prefgen.errors import DataError
from prefgen.testing.data import write_raw


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    path = write_raw(tmp_path_factory.mktemp("raw"), num_users=14, num_liked=2, num_disliked=2)
    (path.parent / "images" / "u000002-liked-000.webp").write_bytes(b"no image")
    for name in ("liked-000", "liked-001", "disliked-000", "disliked-001"):
        (path.parent / "images" / f"u000004-{name}.webp").write_bytes(b"no image")
    return path


def build(out, history, **options):
    settings = {"users_per_shard": 2, "on_bad": "skip"} | options
    return write_shards(read_histories(history), root=history.parent, out=out, **settings)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(history, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    build(out, history)
    assert verify(out, num_workers=1).problems == ()
    return bytes_of(out)


def test_workers_change_no_byte(tmp_path, history, whole):
    reports = []
    build(
        tmp_path / "out",
        history,
        num_workers=2,
        progress=lambda *, users, images: reports.append((users, images)),
    )
    assert bytes_of(tmp_path / "out") == whole
    assert reports[-1] == (14, 14 * 4 - 5)
    assert json.loads(whole[INDEX_NAME])["dropped"] == {"bad image": 5, "user without images": 1}


@pytest.mark.parametrize("count", [1, 3, 9])
def test_parts_change_no_byte(tmp_path, history, whole, count):
    out = tmp_path / "out"
    for number in reversed(range(count)):
        build(out, history, part=Part(number=number, count=count))
        assert not (out / INDEX_NAME).exists()
    index = merge_parts(out)
    assert index == read_index(out)
    assert bytes_of(out) == whole


def test_a_merge_that_was_killed_goes_on(tmp_path, history, whole):
    out = tmp_path / "out"
    for number in range(2):
        build(out, history, part=Part(number=number, count=2))
    (out / PARTS_FOLDER / "train-000000.tar").rename(out / "train-000000.tar")
    merge_parts(out)
    assert bytes_of(out) == whole


def test_what_a_merge_refuses(tmp_path, history):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no finished parts"):
        merge_parts(out)
    build(out, history, part=Part(number=0, count=3))
    with pytest.raises(DataError, match=r"part\(s\) 1, 2 are not finished"):
        merge_parts(out)
    for number in (1, 2):
        build(out, history, part=Part(number=number, count=3), users_per_shard=1 + number)
    with pytest.raises(DataError, match="built from different histories or settings"):
        merge_parts(out)
    build(out, history, part=Part(number=2, count=3))
    build(out, history, part=Part(number=1, count=3))
    gone = out / PARTS_FOLDER / "train-000001.tar"
    gone.rename(tmp_path / "kept")
    with pytest.raises(DataError, match="train-000001.tar is missing"):
        merge_parts(out)
    (tmp_path / "kept").rename(gone)
    (out / INDEX_NAME).write_text("{}")
    with pytest.raises(DataError, match="already holds shards"):
        merge_parts(out, overwrite=False)
    assert merge_parts(out).counts("train").users > 0
    assert verify(out, num_workers=1).problems == ()


def test_an_error_in_a_worker_is_one_line_and_leaves_no_index(tmp_path, history):
    with pytest.raises(DataError, match=r"user u000004: liked\[0\]"):
        build(tmp_path / "out", history, num_workers=2, on_bad="raise")
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_part_words():
    assert Part.parse("3/8") == Part(number=3, count=8)
    assert [WHOLE.share(7), Part(number=1, count=3).share(7)] == [range(7), range(2, 4)]
    for bad in ("8/8", "x", "1", "-1/2", "1/0"):
        with pytest.raises(DataError):
            Part.parse(bad)
    array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "2"}
    assert Part.from_environment(array) == Part(number=3, count=4)
    assert Part.from_environment({"RANK": "1", "WORLD_SIZE": "2"}) == Part(number=1, count=2)
    assert Part.from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}) == Part(number=0, count=6)
    with pytest.raises(DataError, match="needs a Slurm array job, torchrun or srun"):
        Part.from_environment({})
