import json
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace

import pytest
import webdataset
from PIL import Image

from prefgen.data.index import read_index
from prefgen.data.reader import ShardReader
from prefgen.data.shards import assign_split, read_histories, write_shards
from prefgen.data.tarstore import remove_shards
from prefgen.data.verify import verify
from prefgen.errors import DataError
from prefgen.schema import RatedImage
from prefgen.testing.data import make_shards, write_raw


def build(folder, history, **options):
    return write_shards(read_histories(history), root=history.parent, out=folder, **options)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_same_input_same_bytes(tmp_path):
    history = write_raw(tmp_path, num_users=9)
    build(tmp_path / "a", history, users_per_shard=2)
    build(tmp_path / "b", history, users_per_shard=2)
    first = bytes_of(tmp_path / "a")
    assert first == bytes_of(tmp_path / "b")
    assert list(first) == sorted(
        ["index.json", "test-000000.tar", "validation-000000.tar", "train-000000.tar"]
        + ["train-000001.tar", "train-000002.tar"]
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_plain_webdataset_reads_the_shards(tmp_path):
    """With explicit decoders: webdataset's default ones would execute pickled members."""
    shards = make_shards(tmp_path, num_users=8, users_per_shard=3)
    urls = [str(path) for path in sorted(shards.glob("train-*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode(
        webdataset.handle_extension("history.json", json.loads), only=["history.json"]
    )
    users = {sample["__key__"]: sample for sample in dataset}
    reader = ShardReader(shards, split="train")
    assert sorted(users) == sorted(reader.user_ids)
    for position in range(len(reader)):
        mine, theirs = reader[position], users[reader.user_ids[position]]
        assert theirs["history.json"] == json.loads(json.dumps(mine.history.to_json()))
        assert tuple(theirs[f"liked.{i:03d}.webp"] for i in range(5)) == mine.liked
        assert tuple(theirs[f"disliked.{i:03d}.webp"] for i in range(4)) == mine.disliked


def test_images_keep_their_bytes_and_the_history_its_words(tmp_path):
    history = write_raw(tmp_path, num_users=4)
    build(tmp_path / "out", history)
    reader = ShardReader(tmp_path / "out", split="train")
    for original, sample in zip(list(read_histories(history))[:2], (reader[0], reader[1]), strict=True):
        assert sample.liked == tuple((tmp_path / i.image).read_bytes() for i in original.liked)
        assert [i.prompt for i in sample.history.disliked] == [i.prompt for i in original.disliked]
        assert sample.history.liked_attributes == original.liked_attributes


def test_other_formats_become_webp_and_large_images_shrink(tmp_path):
    from prefgen.data.user_samples import BuildLimits

    history = write_raw(tmp_path, num_users=1, splits=False)
    first = next(iter(read_histories(history)))
    Image.new("RGB", (300, 200), "red").save(tmp_path / first.liked[0].image, "BMP")
    Image.new("RGB", (40, 80), "red").save(tmp_path / first.liked[1].image, "JPEG")
    write_shards(
        [replace(first, split="train")], root=tmp_path, out=tmp_path / "out", limits=BuildLimits(max_side=50)
    )
    sample = ShardReader(tmp_path / "out", split="train")[0]
    assert [image.image for image in sample.history.liked[:3]] == [f"liked.{i:03d}.webp" for i in range(3)]
    from prefgen.data.reader import decode_image

    assert [decode_image(data, where="x").size for data in sample.liked[:3]] == [(50, 33), (25, 50), (24, 24)]


@pytest.mark.parametrize("most", [2, 3, 4, 8])
def test_a_user_with_many_images_is_one_logical_user(tmp_path, most):
    whole = ShardReader(make_shards(tmp_path / "a", num_users=8), split="train")
    shards = make_shards(tmp_path / "b", num_users=8, max_images_per_sample=most)
    parts = ShardReader(shards, split="train")
    assert len(parts) == len(whole) == 4
    for position in range(4):
        assert (parts[position].liked, parts[position].disliked) == (
            whole[position].liked,
            whole[position].disliked,
        )
        assert parts[position].history == whole[position].history
    index = read_index(shards)
    samples = [sample for shard in index.splits["train"] for sample in shard.samples]
    assert len(samples) > 4
    assert max(sample.liked + sample.disliked for sample in samples) <= most
    assert index.counts("train").users == 4
    assert verify(shards, num_workers=1).problems == ()


def test_split_by_stable_hash(tmp_path):
    users = [f"user {i}" for i in range(2000)]
    found = [assign_split(user, fractions=(0.8, 0.1, 0.1)) for user in users]
    assert abs(found.count("train") / 2000 - 0.8) < 0.03
    assert found == [assign_split(user, fractions=(0.8, 0.1, 0.1)) for user in users]
    assert [assign_split(f"u{i}") for i in (0, 7, 14, 21)] == GOLDEN_SPLITS
    with pytest.raises(DataError, match="sum to 1"):
        assign_split("u", fractions=(0.8, 0.1, 0.2))


GOLDEN_SPLITS = ["train"] * 4


def test_any_user_id(tmp_path):
    history = next(iter(read_histories(write_raw(tmp_path, num_users=1))))
    ids = ["..", "a.b.c", "Jörg", "x" * 128, "~1", "a b", "plain-id_7"]
    users = [replace(history, user_id=user, split="train") for user in ids]
    write_shards(users, root=tmp_path, out=tmp_path / "out")
    reader = ShardReader(tmp_path / "out", split="train")
    assert [reader[i].user_id for i in range(len(ids))] == ids


BAD_PATHS = {
    "../outside.webp": "must be relative and stay inside",
    "images/../../outside.webp": "must be relative and stay inside",
    "/etc/passwd": "must be relative and stay inside",
    "C:\\x.webp": "must be relative and stay inside",
    "pipe:touch hacked": "pipes and URLs are refused",
    "http://example.org/x.webp": "pipes and URLs are refused",
    "images/missing.webp": "cannot be read",
    "images": "not a regular file",
    "fifo": "not a regular file",
    "link.webp": "leads outside",
    "text.webp": "cannot be decoded",
    "empty.webp": "cannot be decoded",
    "x" * 5000: "cannot be read",
}


@pytest.fixture
def hostile(tmp_path):
    """A raw folder with hostile files beside the good ones, and its only history."""
    root = tmp_path / "raw"
    history = next(iter(read_histories(write_raw(root, num_users=1))))
    os.mkfifo(root / "fifo")
    (tmp_path / "outside.webp").write_bytes((root / history.liked[0].image).read_bytes())
    (root / "link.webp").symlink_to(tmp_path / "outside.webp")
    (root / "text.webp").write_text("no picture")
    (root / "empty.webp").write_bytes(b"")
    return root, replace(history, split="train")


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: path[:20])
def test_bad_image_paths(hostile, tmp_path, path):
    root, history = hostile
    bad = replace(history, liked=(RatedImage(image=path), *history.liked))
    with pytest.raises(DataError, match=BAD_PATHS[path]) as caught:
        write_shards([bad], root=root, out=tmp_path / "out")
    assert f"user {history.user_id}: liked[0]" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())  # nothing half written
    index = write_shards([bad], root=root, out=tmp_path / "out", on_bad="skip")
    assert index.dropped == {"bad image": 1}
    assert read_index(tmp_path / "out").dropped == {"bad image": 1}
    assert len(ShardReader(tmp_path / "out", split="train")[0].liked) == len(history.liked)


def test_users_without_usable_images_are_dropped_and_counted(hostile, tmp_path):
    root, history = hostile
    empty = replace(history, user_id="empty", liked=(RatedImage(image="text.webp"),), disliked=())
    index = write_shards([history, empty], root=root, out=tmp_path / "out", on_bad="skip")
    assert index.dropped == {"bad image": 1, "user without images": 1}
    with pytest.raises(DataError, match="user empty: no usable image"):
        write_shards([replace(empty, liked=())], root=root, out=tmp_path / "b")
    with pytest.raises(DataError, match="no users with images"):
        write_shards([empty], root=root, out=tmp_path / "c", on_bad="skip")


def test_two_users_with_one_id(tmp_path):
    history = write_raw(tmp_path, num_users=4)
    lines = history.read_text().splitlines()
    twin = json.loads(lines[0]) | {"split": "test"}
    history.write_text("\n".join([*lines, json.dumps(twin)]))
    with pytest.raises(DataError, match="two users with the id 'u000000'"):
        build(tmp_path / "out", history, on_bad="skip")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid json"),
        ("[" * 200_000, "nested too deeply"),
        ("\xff", "not valid json"),
        ("[]", "expected a json object, got list"),
        ('{"user_id": "a/b"}', "user_id 'a/b' must be"),
        ('{"user_id": "a", "likes": []}', "unknown field 'likes'"),
        ('{"user_id": "' + "x" * (17 << 20) + '"}', "line of over 16,777,216 bytes"),
    ],
    ids=["torn", "deep", "bytes", "list", "slash", "field", "huge"],
)
def test_bad_history_lines(tmp_path, line, message):
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"user_id": "fine"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read_histories(path))
    assert f"{path}:3" in str(caught.value)


def test_an_occupied_folder_is_kept_unless_told(tmp_path):
    history = write_raw(tmp_path, num_users=12)
    out = tmp_path / "out"
    build(out, history, users_per_shard=1)
    before = bytes_of(out)
    with pytest.raises(DataError, match="already holds shards.*--overwrite"):
        build(out, history)
    assert bytes_of(out) == before
    (out / "notes.txt").write_text("mine")
    build(out, history, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["index.json", "notes.txt", *(f"{split}-000000.tar" for split in ("train", "validation", "test"))]
    )
    assert verify(out, num_workers=1).problems == ()


KILLED = """
import os, signal, sys
from pathlib import Path
from prefgen.data.shards import read_histories, write_shards
def die(*, users, images):
    if users == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
history = Path(sys.argv[1])
write_shards(read_histories(history), root=history.parent, out=sys.argv[2], users_per_shard=2, progress=die)
"""


def test_a_killed_writer_leaves_no_half_shard(tmp_path):
    history = write_raw(tmp_path, num_users=12)
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(history), str(out), "7"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (out / "index.json").exists()
    with pytest.raises(DataError, match="no shard index"):
        ShardReader(out, split="train")
    for path in out.glob("*.tar"):  # whichever are there are whole
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 2 * 10
    build(out, history, users_per_shard=2, overwrite=True)
    assert verify(out, num_workers=1).problems == ()


def test_what_a_killed_writer_left_goes_with_the_shards(tmp_path):
    for name in (".train-000000.tar.tmp", "index.json.part", "train-000000.tar", "mine.txt"):
        (tmp_path / name).write_bytes(b"x")
    remove_shards(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
