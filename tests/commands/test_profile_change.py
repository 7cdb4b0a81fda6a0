"""``profile update``, ``combine``, ``build --tastes | --shards`` and ``score`` as typed, on tiny models."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from prefgen.cli import main
from prefgen.profile import UserProfile
from prefgen.testing.artefacts import save_tiny_artefacts
from prefgen.testing.data import make_shards


def picture(path, *, colour, seed):
    noise = np.random.default_rng(seed).integers(0, 40, (20, 20, 3))
    Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Artefacts, folders of images, and two profiles."""
    root = tmp_path_factory.mktemp("changes")
    save_tiny_artefacts(root / "tiny")
    for side, colours in (("liked", [(200, 0, 0)] * 2), ("disliked", [(0, 0, 200)]), ("new", [(0, 200, 0)])):
        (root / side).mkdir()
        for number, colour in enumerate(colours):
            picture(root / side / f"{number}.png", colour=colour, seed=number)
    return root


@pytest.fixture(scope="module")
def models(place):
    tiny = place / "tiny"
    return ["--artefacts", str(tiny), "--pipeline", str(tiny / "pipeline"), "--mllm", str(tiny / "mllm")]


@pytest.fixture(scope="module")
def profile(place, models):
    path = place / "me.safetensors"
    images = ["--liked", str(place / "liked"), "--disliked", str(place / "disliked")]
    assert main(["profile", "build", *images, "--out", str(path), "--words", *models]) == 0
    return path


def run(*words):
    return main([str(word) for word in words])


def fails(capsys, *words):
    """The one line a mistake is answered with."""
    assert run(*words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefgen: error: ")]
    assert len(errors) == 1
    return errors[0]


def test_update_in_place_and_beside(place, models, profile, tmp_path, capsys):
    own = tmp_path / "own.safetensors"
    own.write_bytes(profile.read_bytes())
    other = tmp_path / "other.safetensors"
    assert run("profile", "update", own, "--liked", place / "new", "--out", other, *models) == 0
    out = capsys.readouterr().out
    assert "words: dropped, they spoke of the earlier images alone; --words adds" in out
    assert "1 liked, 0 disliked images added, now 3 and 1; update 1)" in out
    assert own.read_bytes() == profile.read_bytes()
    judge = place / "new" / "judge.csv"
    judge.write_text("image,liked\n0.png,no\n1.png,\n")
    try:
        assert run("profile", "update", own, "--judged", judge, "--words", *models) == 0
    finally:
        judge.unlink()
    assert "likes:" in capsys.readouterr().out
    counts = UserProfile.load(own).counts
    assert (counts.liked, counts.disliked, counts.updates) == (2, 2, 1)
    assert run("profile", "show", other) == 0
    assert "updates: 1 since it was built" in capsys.readouterr().out


def test_updates_that_cannot_be_made_are_one_line(place, models, profile, tmp_path, capsys):
    assert "needs new images: --liked DIR, --disliked DIR or --judged" in fails(
        capsys, "profile", "update", profile
    )
    new = ["--liked", place / "new", *models]
    assert "exists; pass another --out FILE" in fails(
        capsys, "profile", "update", profile, *new, "--out", profile
    )
    absent = tmp_path / "judge.csv"
    assert "cannot read" in fails(capsys, "profile", "update", profile, "--judged", absent, *models)
    absent.write_text("image,liked\nx.png,yes\n")
    assert "x.png: No such file" in fails(capsys, "profile", "update", profile, "--judged", absent, *models)


def test_combine(place, profile, tmp_path, capsys):
    out = tmp_path / "us.safetensors"
    assert run("profile", "combine", profile, profile, "--weights", "1,-0.25", "--out", out) == 0
    said = capsys.readouterr().out
    assert f"80.0% {profile}\n" in said
    assert f"20.0% {profile}, its negative twin" in said
    assert "words: dropped" in said
    assert "3 liked, 3 disliked images" in said
    assert run("profile", "show", out) == 0
    assert "combined: from 2 profiles" in capsys.readouterr().out
    combine = ["profile", "combine", profile, profile]
    assert "exists; pass another --out" in fails(capsys, *combine, "--out", out)
    new = tmp_path / "new.safetensors"
    for weights, message in (
        ("0,0", "at least one weight must be above 0, got 0,0"),
        ("1", "1 weights for 2 profiles"),
        ("1;2", "expected numbers between commas"),
        ("nan,1", "expected numbers between commas"),
    ):
        assert message in fails(capsys, *combine, f"--weights={weights}", "--out", new)
    assert not new.exists()


def test_profiles_of_other_models_do_not_combine(place, profile, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    loaded = UserProfile.load(profile)
    from dataclasses import replace

    replace(loaded, lineage={**loaded.lineage, "lora": "f" * 64}).save(other)
    error = fails(capsys, "profile", "combine", profile, other, "--out", tmp_path / "x.safetensors")
    assert f"{other}: this profile was made by another lora (ffffffffffff) than that of {profile}" in error


def test_tastes_become_numbered_profiles(place, models, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number in range(5):
        picture(mixed / f"{number}.png", colour=(200, 0, 0) if number < 3 else (0, 0, 200), seed=number)
    out = tmp_path / "me.safetensors"
    build = ["profile", "build", "--liked", mixed, "--out", out, *models]
    assert run(*build, "--tastes", 2) == 0
    said = capsys.readouterr().out
    assert "tastes: 2 among 5 liked images (mean silhouette" in said
    assert "me-1.safetensors" in said
    assert "3 liked, 0 disliked images): 0.png, 1.png, 2.png" in said
    assert "2 liked, 0 disliked images): 3.png, 4.png" in said
    assert not out.exists()
    counts = [UserProfile.load(tmp_path / f"me-{i}.safetensors").counts.liked for i in (1, 2)]
    assert counts == [3, 2]
    assert "me-1.safetensors exists; pass another --out" in fails(capsys, *build, "--tastes", "auto")
    error = fails(capsys, *build, "--tastes", 1, "--overwrite")
    assert "me-2.safetensors is left of a build with more tastes" in error
    assert "make from 1 to 5 tastes, got 6" in fails(capsys, *build, "--tastes", 6)
    assert "expected a whole number of at least 1, or auto, got 'many'" in fails(
        capsys, *build, "--tastes", "many"
    )


def test_profiles_of_all_users_of_a_split(models, tmp_path, capsys):
    shards = make_shards(tmp_path, num_users=8, num_liked=2, num_disliked=1)
    out = tmp_path / "profiles"
    build = ["profile", "build", "--shards", shards, "--out", out, *models]
    assert run(*build, "--split", "test") == 0
    said = capsys.readouterr().out
    assert f"profiles: {out} (2 built, 0 kept, 0 left out)" in said
    assert f"index:    {out / 'profiles.json'}" in said
    assert len(json.loads((out / "profiles.json").read_text())["profiles"]) == 2
    assert run(*build, "--split", "test") == 0
    assert "(0 built, 2 kept, 0 left out)" in capsys.readouterr().out
    for words, message in (
        ([], "--shards needs --split, one of train, validation, test"),
        (["--split", "test", "--liked", out], "--liked and --shards exclude each other"),
        (["--split", "test", "--tastes", "2"], "--tastes and --shards exclude each other"),
        (["--split", "test", "--user-id", "ann"], "--user-id takes no NAME with --shards"),
        (["--split", "test", "--overwrite"], "whole profiles are kept; name a new --out"),
        (["--split", "all"], "invalid choice: 'all'"),
    ):
        assert message in fails(capsys, *build, *words)


def test_build_without_images_is_one_line(tmp_path, capsys):
    out = ["--out", tmp_path / "x.safetensors"]
    assert "needs --liked DIR, or --shards DIR --split S" in fails(capsys, "profile", "build", *out)
    liked = ["--liked", tmp_path, *out]
    assert "--split goes with --shards" in fails(capsys, "profile", "build", *liked, "--split", "test")
    assert "--user-id needs a NAME here" in fails(capsys, "profile", "build", *liked, "--user-id")


def test_scores_from_the_file_or_from_the_model(place, models, profile, tmp_path, capsys):
    folder, table = tmp_path / "pictures", tmp_path / "scores.csv"
    folder.mkdir()
    for name, colour in (("blue.png", (0, 0, 200)), ("red.png", (200, 0, 0))):
        picture(folder / name, colour=colour, seed=0)
    score = ["score", "--profile", profile, "--images", folder]
    assert run(*score, "--out", table, *models) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rank   score  image"
    assert lines[1].split()[::2] == ["1", "red.png"], "the very picture that was liked"
    assert lines[2].split() == ["2", "-0.5000", "blue.png"], "the very picture that was disliked"
    assert lines[3] == f"scores: {table}"
    assert lines[4].startswith("scored by both means: where each image lies between")
    assert lines[4].endswith("Not a probability")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["rank"], row["image"]) for row in rows] == [("1", "red.png"), ("2", "blue.png")]
    sides = ["--liked", place / "liked", "--disliked", place / "disliked"]
    assert run(*score, *sides, *models) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("scored by mllm: the MLLM's probability of")
    assert "no calibration.json stands beside the LoRA" in lines[-1]
    assert all(0 < float(line.split()[1]) < 1 for line in lines[1:3])
    assert "exists; pass another --out" in fails(capsys, *score, "--out", table, *models)
    assert "--disliked needs the liked images too" in fails(capsys, *score, "--disliked", folder, *models)
