import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from prefgen.errors import CheckpointError
from prefgen.profile import TENSORS, ProfileCounts, UserProfile

LINEAGE = {"mllm": "a" * 64, "lora": "b" * 64, "probe": "c" * 64, "image_encoder": "d" * 64}


def make_profile(**changes):
    generator = torch.Generator().manual_seed(0)
    widths = {"core": 3, "sem": 6, "image": 4}
    tensors = {name: torch.randn(widths[name.split("_")[0]], generator=generator) for name in TENSORS}
    counts = ProfileCounts(liked=2, disliked=1, draws=4)
    return UserProfile(**{**tensors, "counts": counts, "lineage": LINEAGE, **changes})


def _header(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["profile"])


def _rewrite(path, *, header=None, tensors=None):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header is not None:
        metadata = {"profile": header if isinstance(header, str) else json.dumps(header)}
    save_file({**own, **(tensors or {})}, path, metadata=metadata)


def test_file_gives_everything_back(tmp_path):
    profile = make_profile(user_id="ann", likes="warm palette", dislikes="line art")
    path = tmp_path / "deep" / "me.safetensors"
    profile.save(path)
    loaded = UserProfile.load(path)
    for name in TENSORS:
        assert torch.equal(getattr(loaded, name), getattr(profile, name))
    assert loaded.counts == profile.counts
    assert (loaded.lineage, loaded.user_id) == (LINEAGE, "ann")
    assert (loaded.likes, loaded.dislikes) == ("warm palette", "line art")
    assert [item.name for item in path.parent.iterdir()] == ["me.safetensors"]


def test_nothing_a_person_could_read_unless_asked(tmp_path):
    path = tmp_path / "me.safetensors"
    make_profile(user_id="ann", likes="warm palette").without_words().save(path)
    assert b"ann" not in path.read_bytes()
    assert b"warm" not in path.read_bytes()
    assert _header(path)["user_id"] is None


def test_two_saves_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        make_profile().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_sides_are_the_taste_and_its_negative_twin():
    profile = make_profile()
    assert profile.side("liked")[0] is profile.sem_embeds
    assert profile.side("disliked")[1] is profile.core_negative


def test_another_lineage_is_refused_by_name_and_unknown_parts_are_not_compared():
    profile = make_profile()
    profile.require_lineage({**LINEAGE, "unet": "x"}, what="the adapter")
    profile.require_lineage({"mllm": LINEAGE["mllm"]}, what="the adapter")
    with pytest.raises(
        CheckpointError, match=r"another lora \(bbbbbbbbbbbb\) than that of the adapter .*\(ffff"
    ):
        profile.require_lineage({**LINEAGE, "lora": "f" * 64}, what="the adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"core_embeds": torch.tensor([1.0, float("nan"), 0.0])}, "core_embeds holds NaN"),
        ({"sem_embeds": torch.zeros(2, 3)}, r"sem_embeds must be one row of numbers, got shape \(2, 3\)"),
        ({"sem_embeds": torch.zeros(0)}, "sem_embeds must be one row"),
        ({"image_embeds": torch.zeros(4, dtype=torch.float64)}, "image_embeds must be float32"),
        ({"sem_negative": torch.zeros(5)}, "sem_negative has 5 numbers, sem_embeds has 6"),
    ],
)
def test_tensors_that_build_never_makes_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        make_profile(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "profile version 3; this prefgen reads versions 1 and 2"),
        ({"version": True}, "profile version True; this prefgen reads versions 1 and 2"),
        ({"version": 1}, "profile counts must be disliked, draws, liked as whole numbers"),
        ({"counts": {"liked": 1, "disliked": -1, "draws": 1}}, "profile counts must be"),
        ({"counts": {"liked": 1}}, "profile counts must be"),
        ({"counts": {"liked": 1, "disliked": 1, "draws": 1}}, "counts must be combined, disliked, draws,"),
        ({"lineage": ["a"]}, "lineage must map names to hashes"),
        ({"likes": "x" * 10001}, "likes must be text of at most 10000"),
        ({"user_id": 7}, "user_id must be text"),
    ],
)
def test_headers_that_save_never_writes_are_refused(tmp_path, change, message):
    path = tmp_path / "me.safetensors"
    make_profile().save(path)
    _rewrite(path, header={**_header(path), **change})
    with pytest.raises(CheckpointError, match=message):
        UserProfile.load(path)


def test_files_of_version_1_are_read(tmp_path):
    path = tmp_path / "me.safetensors"
    profile = make_profile()
    profile.save(path)
    header = {name: value for name, value in _header(path).items() if name != "sha256"}
    old = {name: header["counts"][name] for name in ("liked", "disliked", "draws")}
    _rewrite(path, header={**header, "version": 1, "counts": old})
    loaded = UserProfile.load(path)
    assert loaded.counts == profile.counts
    assert (loaded.counts.updates, loaded.counts.combined) == (0, 0)
    loaded.save(path)
    assert _header(path)["version"] == 2


def test_files_are_as_small_as_their_numbers(tmp_path):
    """Widths of a mini model: four hidden layers and a core of 256, CLIP embeddings of 128."""
    widths = {"core": 256, "sem": 1024, "image": 128}
    tensors = {name: torch.randn(widths[name.split("_")[0]]) for name in TENSORS}
    path = tmp_path / "me.safetensors"
    make_profile(**tensors).save(path)
    numbers = sum(len(tensor) for tensor in tensors.values())
    assert path.stat().st_size < 4 * numbers + 3000
    assert path.stat().st_size < 20_000


def test_files_that_are_no_profile_are_refused(tmp_path):
    path = tmp_path / "me.safetensors"
    with pytest.raises(CheckpointError, match="cannot read profile .*No such file"):
        UserProfile.load(path)
    make_profile().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match="is no prefgen profile or torn"):
        UserProfile.load(path)
    path.write_bytes(whole)
    _rewrite(path, tensors={"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="tensor 'extra' is missing or not part"):
        UserProfile.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="has no profile header"):
        UserProfile.load(path)
    path.write_bytes(whole)
    _rewrite(path, header="[" * 5000)
    with pytest.raises(CheckpointError, match="header is not a json object"):
        UserProfile.load(path)
    with path.open("r+b") as file:
        file.truncate(17 << 20)
    with pytest.raises(CheckpointError, match="a profile has at most"):
        UserProfile.load(path)


@pytest.mark.parametrize("where", [-1, b"aaaa"])
def test_a_bit_that_has_turned_is_noticed(tmp_path, where):
    """In a number, and in the hash of the model that made it."""
    path = tmp_path / "me.safetensors"
    make_profile().save(path)
    data = bytearray(path.read_bytes())
    data[data.index(where) if isinstance(where, bytes) else where] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: its sha256 .*; copy it again, or build it again"):
        UserProfile.load(path)


def test_a_path_that_cannot_be_written_is_said_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write profile"):
        replace(make_profile()).save(tmp_path / "file" / "me.safetensors")
