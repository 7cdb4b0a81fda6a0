"""Profiles of all users of some shards."""

import json

import pytest
import torch

from prefgen import profile_batch
from prefgen.data.reader import ShardReader
from prefgen.errors import DataError
from prefgen.profile import UserProfile
from prefgen.profile_batch import build_profiles, safe_name
from prefgen.taste import TasteModels
from prefgen.testing.artefacts import save_tiny_artefacts
from prefgen.testing.data import make_shards


@pytest.fixture(scope="module")
def taste(tmp_path_factory):
    folder = save_tiny_artefacts(tmp_path_factory.mktemp("batch") / "tiny")
    return TasteModels.load(
        mllm=str(folder / "mllm"),
        lora=folder / "lora",
        probe=folder / "probe.json",
        image_encoder=folder / "pipeline" / "image_encoder",
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("histories"), num_users=12, num_liked=2, num_disliked=1)


def test_one_file_a_user_and_an_index(taste, shards, tmp_path):
    told = []
    result = build_profiles(taste, shards=shards, split="test", out=tmp_path, progress=told.append)
    users = ShardReader(shards, split="test").user_ids
    assert (result.built, result.kept, result.skipped) == (3, 0, ())
    assert told == [1, 1, 1]
    names = {item.name for item in tmp_path.iterdir()}
    assert names == {"profiles.json", *(f"{user}.safetensors" for user in users)}
    index = json.loads(result.index.read_text())
    assert (index["version"], index["split"], index["lineage"]) == (1, "test", taste.lineage)
    assert [row["file"] for row in index["profiles"]] == [f"{user}.safetensors" for user in users]
    assert {(row["liked"], row["disliked"]) for row in index["profiles"]} == {(2, 1)}
    assert not any("user_id" in row for row in index["profiles"])
    profile = UserProfile.load(tmp_path / f"{users[0]}.safetensors")
    assert profile.user_id is None
    assert (profile.counts.liked, profile.counts.disliked) == (2, 1)


def test_whole_files_are_kept_and_torn_or_other_ones_built_again(taste, shards, tmp_path, monkeypatch):
    options = {"shards": shards, "split": "test", "out": tmp_path}
    build_profiles(taste, **options)
    files = sorted(tmp_path.glob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    files[0].write_bytes(before[0][:-7])
    files[1].unlink()
    result = build_profiles(taste, **options)
    assert (result.built, result.kept) == (2, 1)
    assert [file.read_bytes() for file in files] == before
    other = taste.build_profile([make_picture(), make_picture()])
    assert other.lineage == taste.lineage
    other.save(files[2])  # as many liked images, but no disliked one
    assert build_profiles(taste, **options).built == 1
    named = build_profiles(taste, user_ids=True, **options)
    assert named.built == 3
    assert UserProfile.load(files[0]).user_id == files[0].stem
    assert json.loads(named.index.read_text())["profiles"][0]["user_id"] == files[0].stem


def make_picture():
    from PIL import Image

    return Image.new("RGB", (20, 20), "red")


def test_a_run_that_was_broken_off_goes_on(taste, shards, tmp_path):
    def stop(count):
        del count
        raise KeyboardInterrupt

    options = {"shards": shards, "split": "test", "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        build_profiles(taste, progress=stop, **options)
    assert not (tmp_path / "profiles.json").exists(), "an index is the sign of a whole set"
    assert build_profiles(taste, **options).kept == 1


def test_users_without_a_liked_image_or_with_damaged_ones_are_left_out(taste, shards, tmp_path, monkeypatch):
    bare = make_shards(tmp_path / "bare", num_users=4, num_liked=0, num_disliked=2)
    result = build_profiles(taste, shards=bare, split="test", out=tmp_path / "a")
    assert result.built == 0
    [entry] = result.skipped
    assert "at least one liked image, got 0" in entry.reason
    assert (entry.liked, entry.disliked) == (0, 2)
    assert json.loads(result.index.read_text())["profiles"][0]["reason"] == entry.reason
    read = ShardReader.read

    def damaged(reader, position):
        if position == 1:
            raise DataError("sample is damaged")
        return read(reader, position)

    monkeypatch.setattr(ShardReader, "read", damaged)
    result = build_profiles(taste, shards=shards, split="test", out=tmp_path / "b")
    assert (result.built, len(result.skipped)) == (2, 1)
    assert result.skipped[0].key


def test_profiles_are_those_of_a_build_from_the_same_images(taste, shards, tmp_path):
    build_profiles(taste, shards=shards, split="test", out=tmp_path)
    sample = ShardReader(shards, split="test").read(0)
    alone = taste.build_profile(
        profile_batch._pictures(sample, side="liked"),
        disliked=profile_batch._pictures(sample, side="disliked"),
    )
    found = UserProfile.load(tmp_path / f"{sample.user_id}.safetensors")
    assert torch.equal(found.sem_embeds, alone.sem_embeds)


@pytest.mark.parametrize(
    "user_id", ["..", ".hidden", "Ann", "a b", "ann\u00e9", "x" * 100, "a\\b", "c:", "-o", "\u4eba"]
)
def test_names_are_safe_on_any_system(user_id):
    name = safe_name(user_id)
    assert name != user_id
    assert name.isascii()
    assert name.replace("-", "").replace("_", "").isalnum()
    assert name[0].isalnum()
    assert len(name) <= 64


def test_names_tell_users_apart():
    assert safe_name("u000017") == "u000017"
    assert len({safe_name(one).lower() for one in ("Ann", "ann", "ANN", "ann ", "ann.")}) == 5
    with pytest.raises(DataError, match="would share the file"):
        profile_batch._file_names(("Ann", safe_name("Ann")))
