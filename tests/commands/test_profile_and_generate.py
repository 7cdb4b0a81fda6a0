"""The commands as typed, in process, on tiny models."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from prefgen.cli import main
from prefgen.lineage import hash_file
from prefgen.profile import UserProfile
from prefgen.testing.artefacts import save_tiny_artefacts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Artefacts, and folders of liked and disliked images."""
    root = tmp_path_factory.mktemp("commands")
    save_tiny_artefacts(root / "tiny")
    rng = np.random.default_rng(0)
    for side, count in (("liked", 2), ("disliked", 1)):
        (root / side).mkdir()
        for number in range(count):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / side / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def models(place):
    tiny = place / "tiny"
    return ["--artefacts", str(tiny), "--pipeline", str(tiny / "pipeline"), "--mllm", str(tiny / "mllm")]


@pytest.fixture(scope="module")
def profile(place, models):
    path = place / "me.safetensors"
    words = ["--liked", str(place / "liked"), "--disliked", str(place / "disliked"), "--out", str(path)]
    assert main(["profile", "build", *words, *models]) == 0
    return path


def fails(capsys, *words):
    """The one line a mistake is answered with."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("prefgen: error: ")]
    assert len(errors) == 1
    assert not any("Traceback" in line for line in lines)
    return errors[0]


def test_build_says_where_and_show_says_what(place, models, profile, capsys):
    second = place / "second.safetensors"
    build = ["profile", "build", "--liked", str(place / "liked"), "--out", str(second), *models]
    assert main([*build, "--words", "--user-id", "ann"]) == 0
    out = capsys.readouterr().out
    assert f"profile: {second}" in out
    assert "2 liked, 0 disliked images" in out
    assert "likes:" in out
    assert main(["profile", "show", str(second)]) == 0
    shown = capsys.readouterr().out
    assert "2 liked, 0 disliked images, mean of 8 draws" in shown
    assert "user_id: ann" in shown
    assert UserProfile.load(second).lineage["mllm"][:12] in shown
    assert main(["profile", "show", str(profile)]) == 0
    assert "words: not stored" in capsys.readouterr().out


def test_explain_from_stored_words_or_from_the_images(place, models, profile, capsys):
    images = ["--liked", str(place / "liked"), "--disliked", str(place / "disliked")]
    assert main(["profile", "explain", str(profile), *images, *models]) == 0
    said = capsys.readouterr().out
    worded = place / "worded.safetensors"
    assert main(["profile", "build", *images, "--words", "--out", str(worded), *models]) == 0
    capsys.readouterr()
    assert main(["profile", "explain", str(worded)]) == 0
    assert capsys.readouterr().out == said


def test_explain_from_the_file_alone_is_a_linear_reading(models, profile, capsys):
    assert main(["profile", "explain", str(profile), *models]) == 0
    likes, dislikes, note = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"likes:    \w+ \(\d\.\d\d\)(, \w+ \(\d\.\d\d\)){2,}", likes)
    assert re.fullmatch(r"dislikes: \w+ \(\d\.\d\d\)(, \w+ \(\d\.\d\d\)){2,}", dislikes)
    assert "linear reading of the embedding" in note
    assert "--words" in note


def test_explain_without_words_or_readout_is_one_line(place, profile, tmp_path, capsys):
    older = tmp_path / "older"
    shutil.copytree(place / "tiny", older)
    (older / "attribute_readout.safetensors").unlink()
    error = fails(capsys, "profile", "explain", profile, "--artefacts", older)
    assert "holds no words; build it with" in error
    error = fails(capsys, "profile", "explain", profile, "--disliked", place / "disliked")
    assert "--disliked needs the liked images too" in error


def draw(profile, out, models, *more):
    words = ["generate", "--profile", profile, "--prompt", "a red fox", "--out", out, "--steps", 2]
    return main([str(word) for word in [*words, "--num-images", 2, "--seed", 3, *models, *more]])


def test_generate_writes_images_grid_and_a_record_that_makes_them_again(
    place, models, profile, tmp_path, capsys
):
    out = tmp_path / "fox"
    assert draw(profile, out, models) == 0
    assert f"grid:   {out / 'grid.png'}" in capsys.readouterr().out
    names = {f"{kind}-{number}.png" for kind in ("base", "image") for number in ("000", "001")}
    names |= {"grid.png", "generation.json", "judge.csv"}
    assert {item.name for item in out.iterdir()} == names
    judged = (out / "judge.csv").read_text().splitlines()
    assert judged == ["image,liked", "image-000.png,", "image-001.png,", "base-000.png,", "base-001.png,"]
    record = json.loads((out / "generation.json").read_text())
    assert [item["seed"] for item in record["images"] if item["user"]] == [3, 4]
    assert record["inputs"]["profile"]["sha256"] == hash_file(profile)
    assert record["versions"]["torch"]

    words = shlex.split(record["command"])
    assert words[0] == "prefgen"
    again = tmp_path / "again"
    words[words.index("--out") + 1] = str(again)
    assert main(words[1:]) == 0
    for item in record["images"]:
        assert hash_file(again / item["file"]) == item["sha256"]


def test_scale_0_draws_the_base_row_twice(models, profile, tmp_path):
    out = tmp_path / "fox"
    assert draw(profile, out, models, "--user-scale", 0) == 0
    for number in ("000", "001"):
        assert hash_file(out / f"base-{number}.png") == hash_file(out / f"image-{number}.png")


def test_without_base(models, profile, tmp_path):
    out = tmp_path / "fox"
    assert draw(profile, out, models, "--no-base", "--negative-prompt", "line art") == 0
    assert not list(out.glob("base-*"))
    assert "--no-base" in json.loads((out / "generation.json").read_text())["command"]


def test_nothing_is_overwritten(place, models, profile, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    error = fails(capsys, "generate", "--profile", profile, "--prompt", "x", "--out", tmp_path, *models)
    assert "is not empty; name a new folder" in error
    error = fails(capsys, "generate", "--profile", profile, "--prompt", "x", "--out", profile, *models)
    assert "is a file; name a folder" in error
    build = ["profile", "build", "--liked", place / "liked", "--out", profile, *models]
    assert "exists; pass another --out FILE or --overwrite" in fails(capsys, *build)
    assert main([*map(str, build), "--disliked", str(place / "disliked"), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is empty; put at least one image"),
        (b"hello", "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "cannot be decoded"),
    ],
)
def test_bad_images_are_one_line(models, tmp_path, capsys, content, message):
    folder = tmp_path / "pictures"
    folder.mkdir()
    if content is not None:
        (folder / "a.png").write_bytes(content)
    out = tmp_path / "x.safetensors"
    assert message in fails(capsys, "profile", "build", "--liked", folder, "--out", out, *models)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-images", "0"], "at least 1"),
        (["--user-scale", "much"], "expected a finite number"),
        (["--steps", "2.5"], "at least 1"),
        (["--steps", "100000"], "num_steps must be from 1 to 1000, got 100000"),
        (["--seed", "-1"], "expected a whole number from 0 to"),
        (["--seed", "9" * 30], "expected a whole number from 0 to"),
        (["--device", "tpu"], "--device: 'tpu' is not one of cpu, cuda, cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees"),
    ],
)
def test_bad_numbers_are_one_line(models, profile, tmp_path, capsys, words, message):
    base = ["generate", "--profile", profile, "--prompt", "x", "--out", tmp_path / "o", *models]
    error = fails(capsys, *base, *words)
    assert message in error
    assert "Error:" not in error, "an exception's name is no message for a user"


def test_a_prompt_too_long_and_no_profile_are_one_line(models, profile, tmp_path, capsys):
    out = tmp_path / "o"
    error = fails(capsys, "generate", "--profile", profile, "--prompt", "zebra " * 40, "--out", out, *models)
    assert "tokens for a text encoder of 24" in error
    assert not out.exists()
    absent = tmp_path / "absent.safetensors"
    error = fails(capsys, "generate", "--profile", absent, "--prompt", "x", "--out", out, *models)
    assert "cannot read profile" in error
    assert "a profile's name ends in .safetensors" in fails(
        capsys, "profile", "build", "--liked", tmp_path, "--out", tmp_path / "me.bin", *models
    )


def test_a_profile_of_other_models_is_refused_before_drawing(profile, tmp_path, capsys):
    other = save_tiny_artefacts(tmp_path / "other", seed=4)
    models = ["--artefacts", other, "--pipeline", other / "pipeline"]
    words = ["--profile", profile, "--prompt", "x", "--out", tmp_path / "o"]
    assert "was made by another mllm" in fails(capsys, "generate", *words, *models)


STEERING = ("--negative-user-scale=-0.5", "--user-scale-schedule", "late", "--user-from", 0.2)


def test_steering_is_recorded_and_the_command_makes_the_same_images_again(models, profile, tmp_path):
    out = tmp_path / "fox"
    blocks = ("--user-scale-blocks", "down=0.5,up=1")
    assert draw(profile, out, models, "--no-base", "--num-images", 1, *STEERING, *blocks) == 0
    record = json.loads((out / "generation.json").read_text())
    settings = {name: value for name, value in record["settings"].items() if "user_" in name}
    assert settings == {
        "user_scale": 0.8,
        "negative_user_scale": -0.5,
        "user_scale_schedule": "late",
        "user_from": 0.2,
        "user_until": 1.0,
        "user_scale_blocks": {"down": 0.5, "up": 1.0},
    }
    words = shlex.split(record["command"])
    assert "--user-scale-blocks=down=0.5,up=1.0" in words
    again = tmp_path / "again"
    words[words.index("--out") + 1] = str(again)
    assert main(words[1:]) == 0
    assert hash_file(again / "image-000.png") == record["images"][0]["sha256"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--negative-user-scale", "0.5", "--guidance-scale", "1"], "guidance_scale 1 switches off"),
        (["--negative-user-scale", "much"], "expected a finite number"),
        (["--user-scale-schedule", "cosine"], "invalid choice: 'cosine'"),
        (["--user-from", "0.8", "--user-until", "0.2"], "0 <= from < until <= 1 is needed"),
        (["--user-scale-blocks", "down"], "expected blocks with a factor each, such as down=0.5"),
        (["--user-scale-blocks", "down=x"], "expected a finite number, got 'x'"),
        (["--user-scale-blocks", "top=1"], "no cross-attention is in block 'top'; this UNet has"),
    ],
)
def test_bad_steering_is_one_line(models, profile, tmp_path, capsys, words, message):
    base = ["generate", "--profile", profile, "--prompt", "x", "--out", tmp_path / "o", *models]
    assert message in fails(capsys, *base, *words)
    assert not (tmp_path / "o").exists()
