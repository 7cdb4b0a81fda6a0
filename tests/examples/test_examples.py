"""Both examples, run as scripts and called, on a tiny untrained pipeline."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prefgen.pipeline import PrefGenPipeline
from prefgen.testing.artefacts import random_profile, save_tiny_artefacts

EXAMPLES = Path(__file__).parents[2] / "examples"
OBJECT, CHARACTER = "object_in_my_colours.py", "character_on_my_background.py"
DRAWN = {"num_images": 2, "seed": 3, "steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_artefacts(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return PrefGenPipeline.load(folder, pipeline=folder / "pipeline", mllm=str(folder / "mllm"))


@pytest.fixture(scope="module")
def profiles(folder):
    return {name: random_profile(folder, seed=i) for i, name in enumerate(("ann", "bo"))}


def script(monkeypatch, name, *words):
    """What the script defines; with words, it is run as typed and its exit code returned."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    if not words:
        return runpy.run_path(str(EXAMPLES / name))
    monkeypatch.setattr(sys, "argv", [name, *(str(word) for word in words)])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return leaving.value.code


def same(first, second):
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_the_shape_is_left_to_the_prompt(monkeypatch, pipeline, profiles):
    draw = script(monkeypatch, OBJECT)["draw"]

    def rows(**dials):
        settings = {"prompt": "a boat", "user_scale": 1.0, "user_from": 0.5, "shape_scale": 0.0}
        return list(draw(pipeline, profiles["ann"], **DRAWN, **(settings | dials)).values())

    base, whole, colours = rows()
    drawn = pipeline.generate(
        "a boat", profile=profiles["bo"], user_scale=0, num_images=2, seed=3, num_steps=4
    )
    assert same(base, drawn)  # nobody's taste
    assert not same(base, whole)
    assert not same(base, colours)
    assert not same(whole, colours)
    # Each dial by itself leads from the third row to the first two.
    assert same(rows(user_from=0.0, shape_scale=1.0)[2], whole)
    assert same(rows(user_from=0.99)[2], base)
    assert not same(rows(shape_scale=1.0)[2], colours)
    assert not same(rows(user_from=0.0)[2], colours)


def test_everybody_has_a_row_behind_the_same_words(monkeypatch, pipeline, profiles):
    draw = script(monkeypatch, CHARACTER)["draw"]
    rows = draw(pipeline, profiles, prompt="a boat, line art", user_scale=0.6, **DRAWN)
    assert list(rows) == ["base model", "ann", "bo"]
    options = {"num_images": 2, "seed": 3, "num_steps": 4}
    ann = pipeline.generate("a boat, line art", profile=profiles["ann"], user_scale=0.6, **options)
    assert same(rows["ann"], ann)
    assert not same(rows["ann"], rows["bo"])
    assert not same(rows["ann"], rows["base model"])


def test_both_run_as_typed_and_say_where_the_grid_is(monkeypatch, folder, profiles, tmp_path, capsys):
    files = []
    for name, profile in profiles.items():
        profile.save(tmp_path / f"{name}.safetensors")
        files += ["--profile", tmp_path / f"{name}.safetensors"]
    models = ["--artefacts", folder, "--pipeline", folder / "pipeline", "--mllm", folder / "mllm"]
    common = [*models, "--num-images", "2", "--steps", "2"]
    out = tmp_path / "new" / "object.png"
    assert script(monkeypatch, OBJECT, *files, *common, "--out", out) == 0
    assert capsys.readouterr().out == f"grid: {out}\n"
    row = 192 + 18 + 4
    with Image.open(out) as grid:
        assert grid.size == (2 * 196 + 4, 18 + 5 * row)  # base, and two rows for each of two users
    rng = np.random.default_rng(0)
    (tmp_path / "liked").mkdir()
    for number in range(2):
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "liked" / f"{number}.png")
    out = tmp_path / "character.png"
    words = [*files[:2], "--liked", tmp_path / "liked", *common, "--fixed", "line art", "--out", out]
    assert script(monkeypatch, CHARACTER, *words) == 0
    with Image.open(out) as grid:
        assert grid.size == (2 * 196 + 4, 18 + 3 * row)


@pytest.mark.parametrize("name", [OBJECT, CHARACTER])
def test_mistakes_are_one_line(monkeypatch, folder, profiles, tmp_path, capsys, name):
    monkeypatch.chdir(tmp_path)  # the grid's place is made first
    models = ["--artefacts", folder, "--pipeline", folder / "pipeline"]
    assert script(monkeypatch, name, *models) == 2
    assert capsys.readouterr().err == (
        "error: whose taste? pass --profile FILE, or --liked DIR and --disliked DIR\n"
    )
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "grid.png"
    assert script(monkeypatch, name, *models, "--out", out) == 2
    assert capsys.readouterr().err == f"error: cannot write --out {out}: File exists\n"
    path = tmp_path / "me.safetensors"
    profiles["ann"].save(path)
    assert script(monkeypatch, name, *models, "--profile", path, "--profile", path) == 2
    assert capsys.readouterr().err == (
        "error: two of me, me have one name, by which rows are told apart; rename one\n"
    )
    assert script(monkeypatch, name, *models, "--profile", path, "--num-images", "0") == 2
    assert "error: num_images must be at least 1, got 0" in capsys.readouterr().err
