import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prefgen.dials.plan import DialPlan
from prefgen.dials.run import run_dial
from prefgen.errors import ConfigError
from prefgen.study.config import load_evaluate_config
from prefgen.testing.study import save_tiny_workdir

PLAN = DialPlan(user_scales=(0.0, 1.0), negative_scales=(0.0, 2.0), images=(1, 3), reference=2)
TOOL = Path(__file__).parents[2] / "tools" / "dial.py"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    workdir = save_tiny_workdir(tmp_path_factory.mktemp("dial"), num_users=16)
    models = workdir / "models"
    return [
        f"workdir={workdir}",
        f"model.pipeline={models / 'pipeline'}",
        f"model.mllm={models / 'mllm'}",
        f"model.judge={models / 'judge.safetensors'}",
        "model.precision=float32",
        "evaluate.num_users=3",
        "evaluate.num_steps=2",
        "evaluate.num_resamples=100",
        "evaluate.minimum_accuracy=0",
    ]


@pytest.fixture(scope="module")
def measured(settings, tmp_path_factory):
    """One whole run, and where it lies."""
    out = tmp_path_factory.mktemp("out")
    return run_dial(load_evaluate_config(overrides=settings), plan=PLAN, out=out).dial, out


def test_the_ends_of_the_dial(measured):
    dial, _ = measured
    assert dial["zero_is_base"] is True
    zero, full = dial["curves"]["user_scale"]
    assert zero["own_vs_base"]["mean"] == zero["own_vs_other"]["mean"] == 0.5  # the same pictures: ties
    assert zero["prompt_fidelity"] == dial["base"]["prompt_fidelity"]
    assert full["utility"] != zero["utility"]
    plain, negative = dial["curves"]["negative_user_scale"]
    assert plain == {**full, "x": 0.0}
    assert negative["utility"] != plain["utility"]
    for points in dial["curves"].values():
        for point in points:
            for rival in ("base", "other", "image_only"):
                found = point[f"own_vs_{rival}"]
                assert 0 <= found["low"] <= found["mean"] + 1e-9
                assert found["mean"] <= found["high"] + 1e-9 <= 1 + 2e-9
                assert found["num_users"] == 3


def test_updates_keep_image_means_and_move_the_rest(measured):
    dial, _ = measured
    rows = {(row["compared"], row["images"]): row["tensors"] for row in dial["distances"]}
    assert list(rows) == [("updated", 3), ("other draws", 3), ("another user", 3)]
    updated, again, other = rows.values()
    assert abs(updated["image_mean"]["mean"]) < 1e-6
    assert again["image_mean"]["mean"] == 0
    assert other["image_mean"]["mean"] > 1e-8
    assert 0 < updated["sem_embeds"]["mean"] < 2
    (row,) = dial["updates_minus_built"]
    built, after = dial["curves"]["images"][1], dial["curves"]["updates"][1]
    assert row["images"] == 3
    assert row["utility"]["mean"] == pytest.approx(after["utility"]["mean"] - built["utility"]["mean"])


def test_the_report_shows_every_curve(measured):
    dial, out = measured
    assert json.loads((out / "dial.json").read_text()) == json.loads(json.dumps(dial))
    text = (out / "dial.md").read_text()
    for name in dial["curves"]:
        with Image.open(out / "dial_files" / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5
        assert f"dial_files/{name}.png" in text
    with Image.open(out / "dial_files" / "pictures_user_scale.png") as image:
        assert image.size == (3 * 20 - 4, 3 * 20 - 4)  # base and two points, three users, pictures of 16
    assert "| user_scale | own against base | own against other | own against image only |" in text
    assert "bit for bit" in text


@pytest.mark.slow
def test_it_goes_on_where_it_was_killed(measured, settings):
    dial, out = measured
    lost = [
        out / "conditions" / "own-built-02-u1-n0.json",
        next((out / "profiles" / "updated-03").glob("*.safetensors")),
        out / "dial.json",
    ]
    kept = out / "conditions" / "nobody.json"
    before = kept.stat().st_mtime_ns
    for path in lost:
        path.unlink()
    again = run_dial(load_evaluate_config(overrides=settings), plan=PLAN, out=out)
    assert again.dial == dial
    assert kept.stat().st_mtime_ns == before
    assert all(path.is_file() for path in lost)


@pytest.mark.slow
def test_points_may_be_added_and_nothing_else_changed(measured, settings, monkeypatch, capsys):
    _, out = measured
    words = ["dial.py", "--out", str(out), "--images", "1,3", "--reference", "2", "--negative-scales", "0,2"]
    monkeypatch.setattr(sys, "argv", [*words, "--user-scales", "0,.5,1", *settings])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert f"json: {out / 'dial.json'}" in capsys.readouterr().out
    dial = json.loads((out / "dial.json").read_text())
    assert [point["x"] for point in dial["curves"]["user_scale"]] == [0, 0.5, 1]
    with pytest.raises(ConfigError, match=r"was begun with another seed; choose another --out"):
        run_dial(load_evaluate_config(overrides=[*settings, "seed=1"]), plan=PLAN, out=out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "1,1.5"], "--images: expected whole numbers, got 1.5"),
        (["--user-scales", "0,much"], "--user-scales: expected numbers with commas, got '0,much'"),
        (["--user-scales", "0,inf"], "--user-scales: expected numbers"),
        (["workdir=nowhere"], "nowhere"),
    ],
)
def test_mistakes_get_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dial.py", *words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(TOOL), run_name="__main__")
    err = capsys.readouterr().err
    assert err.startswith("dial: error: ")
    assert message in err
    assert len(err.splitlines()) == 1
