"""The MLLM's tools run at tiny size; what they print about speed is not looked at."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from prefgen.models.lora import add_lora, save_lora
from prefgen.models.mllm import MLLM
from prefgen.testing.data import make_shards
from prefgen.testing.families import tiny_family_mllm

TOOLS = Path(__file__).parents[2] / "tools"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_shards(folder, num_users=16, num_liked=5, num_disliked=5)
    tiny_family_mllm(folder / "mllm", family="qwen2_5_vl")
    save_lora(add_lora(MLLM.load(folder / "mllm"), rank=2), path=folder / "vqa" / "lora")
    return folder


def test_bench_vqa_prints_equal_logits_and_a_bound(work, monkeypatch, capsys):
    words = ["--mllm", str(work / "mllm"), "--users", "3", "--references", "4", "--questions", "1", "3"]
    monkeypatch.setattr(sys, "argv", ["bench_vqa.py", *words, "--repeats", "1"])
    tool("bench_vqa").main()
    rows = [
        line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if re.match(r"\| \d", line)
    ]
    assert len(rows) == 2 + 2 + 1
    assert all(float(row[8]) < 5e-5 for row in rows)
    bounds = [float(row[6]) for row in rows]
    assert bounds[0] == bounds[2] == 1
    assert bounds[3] > bounds[1] > 1.5, "without targets more is shared"


def test_bench_probe_gives_the_same_states_three_ways(work, monkeypatch, capsys):
    words = ["--mllm", str(work / "mllm"), "--rows", "4", "--rows-per-pass", "2", "--images", "30"]
    module = tool("bench_probe")
    checks = []
    for way in module.WAYS:
        monkeypatch.setattr(sys, "argv", ["bench_probe.py", *words, "--steps", "2", "--way", way])
        module.main()
        checks.append(json.loads(capsys.readouterr().out)["check"])
    assert checks[0] == pytest.approx(checks[1], rel=1e-3)
    assert checks[0] == pytest.approx(checks[2], rel=1e-3)
    together, apart, difference = module.train_probes(3, samples=20, dim=4, steps=2)
    assert difference < 1e-6
    assert together > 0
    assert apart > 0


@pytest.mark.slow
def test_layer_study_compares_three_models_and_shuffled_labels(work, capsys):
    settings = ["trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.precision=32-true"]
    settings += ["trainer.log_every_n_steps=1", "checkpoint.every_n_steps=2", "data.batch_size=16"]
    settings += ["data.inter_train_draws=3", "data.inter_test_draws=2", "data.inter_references=2"]
    settings += ["data.intra_references=2", "data.test_histories=2", "probe.num_resamples=10"]
    settings += [f"model.mllm={work / 'mllm'}", f"model.lora={work / 'vqa' / 'lora'}"]
    study = tool("layer_study")
    # The tiny MLLM is itself random, of seed 0.
    assert study.main(["--workdir", str(work), "--seed", "7", *settings]) == 0
    printed, out = capsys.readouterr().out, work / "layer_study"
    assert (out / "report.md").read_text() in printed
    text = (out / "report.md").read_text()
    for task in ("inter", "intra", "inter_target"):
        assert text.count(f"\n| {task} |") == 3 * 4 + 3 * 3, "four poolings and three classifiers an MLLM"
    for name in ("fine-tuned", "before fine-tuning", "random weights"):
        assert text.count(f"| {name} | core | no target |") == 1 + 1
        assert f"| {name} | sem | verdict of the target | same, different |" in text
    assert "| chance |  |  |  | 0.500 | 0.250 |" in text
    record = json.loads((out / "report.json").read_text())
    assert set(record) == {"tuned", "base", "random"}
    lineages = {json.dumps(one["lineage"], sort_keys=True) for one in record.values()}
    assert len(lineages) == 3
    for name in ("heat_maps.png", "identification.png", "cosines.png"):
        assert (out / name).stat().st_size > 10_000


def test_layer_study_says_what_is_missing(tmp_path, capsys):
    assert tool("layer_study").main(["--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"layer_study: error: no history shards at {tmp_path}")
