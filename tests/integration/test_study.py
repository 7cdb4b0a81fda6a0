"""A real study of tiny runs through the command line: killed, gone on with, reported."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from prefgen.cli import main
from prefgen.testing.study import save_tiny_workdir

pytestmark = pytest.mark.slow

PLAN = """\
version: 1
about: Tiny runs
words:
  evaluate: >-
    evaluate workdir={workdir} out={{run}}/report seed=0 model.pipeline={workdir}/models/pipeline
    model.mllm={workdir}/models/mllm model.judge={workdir}/models/judge.safetensors model.precision=float32
    evaluate.num_users=4 evaluate.num_steps=2 evaluate.num_resamples=100 evaluate.minimum_accuracy=0
    extra.figures=true extra.num_set_resamples=3
runs:
  - name: main
    table: main
    seeds: [0, 1]
    steps: ["{{evaluate}} extra.save_pictures=true extra.conditions=[words_mllm,image_mean]"]
  - name: weak
    table: ablation
    words: half the strength
    steps: ["{{evaluate}} evaluate.user_scale=0.5"]
  - name: broken
    table: ablation
    steps: ["{{evaluate}} evaluate.batch_size=0"]
claims:
  - {{words: full strength is better, better: main, than: weak}}
"""


def finished(work):
    books = {path.parent.name: json.loads(path.read_text()) for path in work.glob("runs/*/steps.json")}
    return {name for name, book in books.items() if book["finished"]}


def test_a_killed_study_goes_on_and_reports(tmp_path, capsys):
    workdir = save_tiny_workdir(tmp_path / "tiny")
    plan, work = tmp_path / "plan.yaml", tmp_path / "study"
    plan.write_text(PLAN.format(workdir=workdir))
    words = ["evaluate", "study", "--plan", str(plan), "--work", str(work)]
    process = subprocess.Popen([sys.executable, "-m", "prefgen", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 1800
    while "main-0" not in finished(work) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert finished(work) == {"main-0"}
    before = (work / "runs" / "main-0" / "report" / "metrics.json").stat().st_mtime_ns
    while (
        time.monotonic() < deadline
    ):  # the step that was left alone ends by itself; until then we are refused
        code = main(words)
        if code != 2:
            break
        assert "is running in" in capsys.readouterr().err
        time.sleep(0.5)
    assert code == 1  # one run is broken
    printed = capsys.readouterr().out
    assert "3 runs finished, 1 failed" in printed
    assert "evaluate.batch_size=0 must be at least 1" in printed
    assert (work / "runs" / "main-0" / "report" / "metrics.json").stat().st_mtime_ns == before
    study = json.loads((work / "study" / "study.json").read_text())
    assert study["seeds"] == [0, 1]
    assert set(study["main"]["conditions"]) >= {"own", "base", "words_mllm", "image_mean"}
    # The two seeds evaluate the same artefacts with the same seed: their numbers agree.
    by_seed = study["main"]["conditions"]["own"]["by_seed"]
    assert by_seed[0] == by_seed[1]
    assert study["missing"] == ["broken"]
    assert [row["name"] for row in study["ablations"]] == ["weak"]
    assert all(row["peak_mb"] > 50 for row in study["costs"])
    assert len(list((work / "study" / "study_files").glob("worst-*.png"))) == 4
    markdown = (work / "study" / "study.md").read_text()
    assert "## Where it fails" in markdown
