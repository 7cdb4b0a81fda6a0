"""Shards in an object store: the same samples, a cache that stays small, words for what is wrong."""

import json
import pickle

import fsspec
import pytest

from prefgen.config import load_config
from prefgen.data.index import INDEX_NAME, index_hash
from prefgen.data.reader import ShardReader
from prefgen.data.remote import RemoteFolder
from prefgen.errors import DataError
from prefgen.run_folder import input_hashes
from prefgen.stages.base import shard_root
from prefgen.testing.data import make_shards

ADDRESS = "memory://bucket/shards"


@pytest.fixture
def local(tmp_path):
    """A local set of 16 users and the same in a store that lives in this process."""
    shards = make_shards(tmp_path, num_users=16, users_per_shard=2)
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    yield shards
    store.rm("/bucket", recursive=True)


def remote(tmp_path, *, max_bytes=10**9, address=ADDRESS):
    return RemoteFolder(address, cache=tmp_path / "cache", max_bytes=max_bytes)


def cached(tmp_path):
    return sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir())


def test_the_same_samples_come(local, tmp_path):
    here, there = ShardReader(local, split="train"), ShardReader(remote(tmp_path), split="train")
    assert there.user_ids == here.user_ids
    assert index_hash(remote(tmp_path)) == index_hash(local)
    for position in range(len(here)):
        one, other = here[position], there[position]
        assert (one.history, one.liked, one.disliked) == (other.history, other.liked, other.disliked)
        assert other.where.startswith(ADDRESS)
    fsspec.filesystem("memory").rm("/bucket/shards/train-000000.tar")
    again = pickle.loads(pickle.dumps(there))
    assert again[0] == there[0]  # from the cache


def test_the_cache_stays_below_its_size(local, tmp_path):
    biggest = max(path.stat().st_size for path in local.glob("*.tar"))
    folder = remote(tmp_path, max_bytes=2 * biggest)
    reader = ShardReader(folder, split="train")
    for _ in range(2):
        for position in range(len(reader)):
            assert reader[position] is not None
            assert cached(tmp_path) <= 2 * biggest
    with pytest.raises(DataError, match="more than the whole cache may hold .*raise loader.cache_gb"):
        ShardReader(remote(tmp_path, max_bytes=100), split="train")[0]


def test_what_is_wrong_is_said(local, tmp_path):
    store = fsspec.filesystem("memory")
    reader = ShardReader(remote(tmp_path), split="train")
    damaged = bytearray((local / "train-000000.tar").read_bytes())
    damaged[700] ^= 1
    store.pipe_file("/bucket/shards/train-000000.tar", bytes(damaged))
    with pytest.raises(DataError, match=r"memory://bucket/shards/train-000000.tar: .*another checksum"):
        reader[0]
    store.pipe_file("/bucket/shards/train-000000.tar", bytes(damaged) + b"x")
    with pytest.raises(DataError, match="more than the .* bytes that are expected"):
        reader[0]
    store.rm("/bucket/shards/train-000001.tar")
    with pytest.raises(DataError, match="no memory://bucket/shards/train-000001.tar; make it with"):
        reader[2]
    assert cached(tmp_path) == 0
    record = json.loads((local / INDEX_NAME).read_text())
    record["splits"]["train"]["shards"][0]["sha256"] = "../../x"
    store.pipe_file(f"/bucket/shards/{INDEX_NAME}", json.dumps(record).encode())
    with pytest.raises(DataError, match="gives no checksum"):
        ShardReader(remote(tmp_path), split="train")[0]
    store.rm(f"/bucket/shards/{INDEX_NAME}")
    with pytest.raises(DataError, match=r"no memory://bucket/shards/index.json"):
        ShardReader(remote(tmp_path), split="train")


@pytest.mark.parametrize(
    "address",
    [
        "pipe:touch hacked",
        "file:///etc",
        "ssh://host/x",
        "simplecache::s3://b/x",
        "s3://b/x::file:///etc",
        "s3://",
    ],
)
def test_other_addresses_are_refused(address, tmp_path):
    with pytest.raises(DataError, match="is no folder prefgen reads"):
        remote(tmp_path, address=address)


def test_stages_take_addresses(local, tmp_path):
    words = [f"data.shards={ADDRESS}", f"loader.cache_dir={tmp_path}/cache", "loader.cache_gb=0.5"]
    (tmp_path / "config.json").write_text("{}")
    config = load_config("vqa", overrides=[*words, f"model.mllm={tmp_path}"])
    for needed in config.required_inputs():
        needed.check()
    root = shard_root(config.data.shards, loader=config.loader)
    assert root == RemoteFolder(ADDRESS, cache=tmp_path / "cache", max_bytes=500_000_000)
    assert input_hashes(config)["data.shards"] == index_hash(local)
