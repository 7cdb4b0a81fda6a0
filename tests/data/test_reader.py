import io
import json
import logging
import pickle
import tarfile

import pytest

from prefgen.data.index import INDEX_NAME, read_index
from prefgen.data.reader import ShardReader
from prefgen.data.verify import inspect, verify
from prefgen.errors import DataError
from prefgen.testing.data import make_embeddings, make_shards


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path, num_users=8, users_per_shard=8)


def members_of(path):
    with tarfile.open(path) as tar:
        return [(info, tar.extractfile(info).read() if info.isreg() else b"") for info in tar]


def rewrite(shards, change, *, name="train-000000.tar"):
    """Change the members of a shard and make an index that fits it: what a hostile writer would do."""
    path = shards / name
    members = change(members_of(path))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        ends, starts = {}, {}
        for info, data in members:
            key = info.name.partition(".")[0]
            starts.setdefault(key, tar.offset)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            ends[key] = tar.offset
    index = json.loads((shards / INDEX_NAME).read_text())
    shard = next(s for s in index["splits"]["train"]["shards"] if s["name"] == name)
    shard["size"] = path.stat().st_size
    index["splits"]["train"]["counts"]["bytes"] = shard["size"]
    for row in shard["samples"]:
        row[2], row[3] = starts[row[0]], ends[row[0]] - starts[row[0]]
    (shards / INDEX_NAME).write_text(json.dumps(index))


def replace_member(suffix, data):
    def change(members):
        return [
            (info, data(old) if info.name == f"u000000.{suffix}" else old)
            for info, old in members
            if not (data is None and info.name == f"u000000.{suffix}")
        ]

    return change


def add_member(name, data=b"x", kind=tarfile.REGTYPE):
    def change(members):
        info = tarfile.TarInfo(name)
        info.type = kind
        info.linkname = "../../target" if kind != tarfile.REGTYPE else ""
        return [members[0], (info, data), *members[1:]]

    return change


def edit_json(**fields):
    def edit(old):
        return json.dumps(json.loads(old) | fields).encode()

    return replace_member("history.json", edit)


CHANGES = {
    "missing image": (replace_member("liked.002.webp", None), "member 'liked.002.webp' is missing"),
    "missing json": (replace_member("history.json", None), "u000000.history.json is missing"),
    "no image": (
        replace_member("liked.002.webp", lambda _: b"text"),
        "'liked.002.webp' is not a webp, jpeg or",
    ),
    "torn json": (replace_member("history.json", lambda old: old[:-5]), "history.json: not valid json"),
    "deep json": (replace_member("history.json", lambda _: b"[" * 100_000), "nested too deeply"),
    "huge json": (
        replace_member("history.json", lambda old: old + b" " * (17 << 20)),
        "json of .* bytes; at most",
    ),
    "other user": (edit_json(user_id="mallory"), "belongs to 'mallory', but the index says 'u000000'"),
    "unknown field": (edit_json(code="x"), "unknown field 'code'"),
    "fewer images": (edit_json(liked=[]), "0 liked and 4 disliked images, but the index says 5 and 4"),
    "pickle": (add_member("u000000.evil.pickle"), "could execute code"),
    "pyd": (add_member("u000000.evil.pyd"), "could execute code"),
    "extra": (add_member("u000000.extra.webp"), "'extra.webp' is not named by its history"),
    "twice": (add_member("u000000.history.json"), "expected each member of 'u000000' once"),
    "link": (add_member("u000000.x.webp", b"", tarfile.SYMTYPE), "is not a regular file"),
    "hard link": (add_member("u000000.x.webp", b"", tarfile.LNKTYPE), "is not a regular file"),
    "device": (add_member("u000000.x.webp", b"", tarfile.CHRTYPE), "is not a regular file"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_bad_samples(shards, case, caplog):
    change, message = CHANGES[case]
    rewrite(shards, change)
    with pytest.raises(DataError, match=message) as caught:
        ShardReader(shards, split="train")[0]
    assert "train-000000.tar: sample u000000" in str(caught.value)
    assert "\n" not in str(caught.value)
    skipping = ShardReader(shards, split="train", on_bad="skip")
    with caplog.at_level(logging.WARNING):
        assert [skipping[i] is None for i in range(4)] == [True, False, False, False]
        skipping[0]
    assert skipping.skipped == 2
    assert len(caplog.records) == 1
    problems = verify(shards, num_workers=1).problems
    assert any("checksum differs" in line for line in problems)
    assert any("sample u000000" in line for line in problems)


def test_a_path_escaping_member_is_foreign(shards):
    """Members are bytes in memory and never files, and even their names must be the sample's own."""

    def change(members):
        info = tarfile.TarInfo("../u000000.evil")
        first, second = members[:2]
        return [first, (info, b"x"), second, *members[2:]]

    path = shards / "train-000000.tar"
    members = change(members_of(path))
    with pytest.raises(ValueError, match="not in list"):
        [info.name for info, _ in members_of(path)].index("../u000000.evil")
    rewrite(shards, lambda _: members)
    with pytest.raises(DataError, match="does not belong here"):
        ShardReader(shards, split="train")[0]


def test_truncated_and_missing_shards(shards):
    path = shards / "train-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-000000.tar: truncated: .* bytes, but index.json says"):
        ShardReader(shards, split="train")[0]
    assert ShardReader(shards, split="train", on_bad="skip")[0] is None
    assert "truncated" in " ".join(verify(shards, num_workers=1).problems)
    path.unlink()
    with pytest.raises(DataError, match="is missing; build or copy the shards again"):
        ShardReader(shards, split="train")[0]
    assert any("cannot be read" in line for line in verify(shards, num_workers=1).problems)


def test_flipped_bits(shards):
    path = shards / "train-000000.tar"
    data = bytearray(path.read_bytes())
    for place in range(600, len(data), 4096):
        data[place] ^= 0xFF
    path.write_bytes(data)
    report = verify(shards, num_workers=1)
    assert any("checksum differs" in line for line in report.problems)
    reader = ShardReader(shards, split="train", on_bad="skip")
    for position in range(len(reader)):
        reader[position]  # whatever it makes of it, nothing but DataError, which is skipped


def test_undecodable_image_and_bomb_are_named(shards):
    rewrite(shards, replace_member("liked.001.webp", lambda old: old[: len(old) // 2]))
    reader = ShardReader(shards, split="train")
    sample = reader[0]
    from prefgen.data.reader import decode_image

    where = sample.image_where("liked", position=1)
    with pytest.raises(
        DataError, match=r"sample u000000: member liked.001.webp: image of \d+ bytes cannot be"
    ):
        decode_image(sample.liked[1], where=where)
    with pytest.raises(DataError, match="24 x 24 pixels; at most 100"):
        decode_image(sample.liked[0], where=where, max_pixels=100)
    assert sum("member liked.001.webp" in line for line in verify(shards, num_workers=1).problems) == 1


def test_image_of_too_many_bytes(shards):
    with pytest.raises(DataError, match=r"has \d+ bytes; at most 10 are accepted"):
        ShardReader(shards, split="train", max_image_bytes=10)[0]


def edit_index(shards, **edits):
    path = shards / INDEX_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | edits))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(schema_version=99), "schema version 99, but this prefgen reads 1; build"),
        (lambda r: r.pop("splits"), "damaged index"),
        (lambda r: r.update(kind="x"), "damaged index"),
        (lambda r: r.update(splits={"trian": {}}), "split 'trian' is not one of"),
        (lambda r: r["splits"]["train"]["counts"].update(users=7), "counts of split 'train' do not match"),
        (lambda r: shard(r).update(name="../../etc/passwd"), "expected a plain file name"),
        (lambda r: shard(r).update(name="pipe:touch hacked"), "expected a plain file name"),
        (lambda r: shard(r).update(name="test-000000.tar"), "expected a plain file name"),
        (lambda r: rows(r)[0].__setitem__(2, -512), "non-negative"),
        (lambda r: rows(r)[0].__setitem__(2, 100), "outside its shard"),
        (lambda r: rows(r)[0].__setitem__(3, 1 << 40), "outside its shard"),
        (lambda r: rows(r)[1].__setitem__(2, 0), "overlap"),
        (lambda r: rows(r)[1].__setitem__(0, "../x"), "not a plain key"),
        (lambda r: rows(r)[2].__setitem__(1, "u000000"), "two users with the id 'u000000'"),
        (lambda r: rows(r, "test")[0].__setitem__(1, "u000000"), "two users with the id 'u000000'"),
        (lambda r: rows(r)[0].append(1), "needs four"),
    ],
)
def test_bad_indices(shards, edit, message):
    path = shards / INDEX_NAME
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=message) as caught:
        ShardReader(shards, split="train")
    assert "\n" not in str(caught.value)


def shard(record):
    return record["splits"]["train"]["shards"][0]


def rows(record, split="train"):
    return record["splits"][split]["shards"][0]["samples"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b"3"])
def test_no_index_at_all(shards, content):
    (shards / INDEX_NAME).write_bytes(content)
    with pytest.raises(DataError, match=r"index\.json"):
        read_index(shards)


@pytest.mark.parametrize("address", ["pipe:touch hacked", "http://x/y", "s3://x/y", "file:/x", "a\x00b"])
def test_pipes_and_urls(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (read_index, inspect, verify):
        with pytest.raises(DataError, match="is not a local path"):
            call(address)
    with pytest.raises(DataError, match="is not a local path"):
        ShardReader(address, split="train")
    assert not list(tmp_path.iterdir())


def test_absent_splits_and_other_kinds(shards, tmp_path):
    record = json.loads((shards / INDEX_NAME).read_text())
    del record["splits"]["test"]
    (shards / INDEX_NAME).write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"no split 'test' in .*; it holds: train, validation"):
        ShardReader(shards, split="test")
    with pytest.raises(DataError, match="holds embeddings, but histories are needed here"):
        ShardReader(make_embeddings(tmp_path / "e"), split="train")


def test_pickled_reader_reads_on(shards):
    reader = ShardReader(shards, split="train")
    first = reader[0]
    assert pickle.loads(pickle.dumps(reader))[0] == first


def test_verify_in_processes_equals_one(tmp_path):
    shards = make_shards(tmp_path, num_users=12, users_per_shard=2)
    (shards / "train-000001.tar").write_bytes(b"")
    (shards / "train-000009.tar").write_bytes(b"left over")
    calls = []
    alone = verify(shards, num_workers=1, progress=lambda **done: calls.append(done))
    helped = verify(shards, num_workers=2)
    assert alone.problems == helped.problems
    assert any("train-000009.tar: not in the index" in line for line in alone.problems)
    assert (alone.users, alone.images, alone.shards) == (helped.users, helped.images, helped.shards)
    assert (alone.users, alone.images, alone.shards) == (10, 90, 7)
    assert calls[-1] == {"shards": 7, "bytes": alone.bytes}


def test_inspect_counts(tmp_path):
    summary = inspect(make_shards(tmp_path, num_users=8, max_images_per_sample=4))
    train = summary.splits["train"]
    assert (train.counts.users, train.samples, train.counts.liked, train.counts.disliked) == (4, 12, 20, 16)
    assert train.liked_histogram == {5: 4}
    assert train.disliked_histogram == {4: 4}
