"""The benchmarks and the table of presets run, at sizes that say nothing about speed."""

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def run(monkeypatch, name, *words):
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(TOOLS / name), run_name="__main__")


def test_generation_is_timed_in_four_ways(monkeypatch, tmp_path, capsys):
    out = tmp_path / "times.json"
    words = ["--pipeline", "tiny", "--steps", "1", "--repeats", "2", "--batch", "2", "--json", str(out)]
    run(monkeypatch, "bench_generate.py", *words)
    (row,) = json.loads(out.read_text())["rows"]
    assert list(row["seconds"]) == ["base", "users", "stock", "stock IP-Adapter"]
    assert all(len(times) == 2 for times in row["seconds"].values())
    assert "a user costs" in capsys.readouterr().out


@pytest.mark.slow
def test_training_is_timed_in_two_ways(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rates.json"
    run(monkeypatch, "bench_inject.py", "--steps", "2", "--warmup", "1", "--rounds", "1", "--json", str(out))
    assert set(json.loads(out.read_text())["rates"]) == {"plain loop", "prefgen fit"}
    assert "share" in capsys.readouterr().out


def table_of(capsys):
    """File -> its line's words."""
    lines = capsys.readouterr().out.splitlines()[1:]
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_the_mini_preset_is_in_the_table(monkeypatch, capsys):
    run(monkeypatch, "preset_table.py", "--preset", "mini")
    found = table_of(capsys)
    for stage in ("vqa", "probe", "align", "inject", "inject_image_only"):
        state, _, trained, *_ = found[f"mini/{stage}.yaml"]
        assert state == "loads"
        assert float(trained.replace(",", "")) > 0
    assert found["mini/evaluate.yaml"][0] == "loads"
    assert found["mini/demo_thresholds.yaml"][:2] == ["no", "stage"]


@pytest.mark.slow  # SDXL's layers take their time even without memory
def test_every_preset_is_in_the_table(monkeypatch, capsys):
    run(monkeypatch, "preset_table.py")
    found = table_of(capsys)
    for path in (TOOLS.parent / "configs").glob("*/*.yaml"):
        assert found[f"{path.parent.name}/{path.name}"][0] in ("loads", "no"), path
    assert found["paper/vqa.yaml"][2:4] == ["21.0", "M"]
    assert found["paper/inject.yaml"][2:] != found["sd15/inject.yaml"][2:]
