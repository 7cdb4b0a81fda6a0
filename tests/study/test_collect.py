"""study.json and its report from runs whose numbers are known."""

import json
import re

import numpy as np
import pytest
import torch

from prefgen.cli import main
from prefgen.errors import DataError
from prefgen.evaluate.blocks import Figure, Grid, Heading, Paragraph, curve_plot, to_html, to_markdown
from prefgen.evaluate.picture_folder import PictureUser, save_user_pictures, write_index
from prefgen.study.collect import collect
from prefgen.study.plan import read_plan
from prefgen.study.writing import write_study

USERS = 12
PLAN = """\
version: 1
about: a try
runs:
  - {name: main, table: main, seeds: [0, 1], steps: [evaluate]}
  - {name: worse, table: ablation, group: loss, words: MSE, steps: [evaluate]}
  - {name: never, table: ablation, steps: [evaluate]}
  - {name: s1, table: curve, curve: user_scale, x: 1, steps: [evaluate]}
  - {name: s0, table: curve, curve: user_scale, x: 0.5, steps: [evaluate]}
claims:
  - {words: a distribution loss is better, better: main, than: worse}
  - {words: never measured, better: main, than: never}
"""


def save_run(work, name, *, own, base=0.0, seed=0, users=USERS, finished=True):
    """A finished run: own utility around ``own``, the others around ``base``."""
    rng = np.random.default_rng([seed, *name.encode()])
    spread = 0.1 * np.random.default_rng(1).normal(size=users)
    shift = {"base": base, "own": own, "other": base, "words": own + 0.5, "real": own + 1}
    utility = {key: (value + spread + 0.01 * rng.normal(size=users)).tolist() for key, value in shift.items()}
    wins = {
        key: [float(a > b) for a, b in zip(utility["own"], rows, strict=True)]
        for key, rows in utility.items()
    }
    wins.pop("own")
    fidelity = {key: [1.0] * (users - 1) + [0.5] for key in shift}
    hits = {key: [None, *[0.5] * (users - 1)] for key in shift}
    folder = work / "runs" / name / "report"
    folder.mkdir(parents=True)
    content = {
        "version": 1, "seed": 0, "users": [f"u{i}" for i in range(users)], "prompts": [["a fox"]] * users,
        "tables": {"utility": utility, "own_wins": wins, "prompt_fidelity": fidelity, "liked_hits": hits},
    }  # fmt: skip
    (folder / "users.json").write_text(json.dumps(content))
    elo = {key: {"mean": 1000.0 + seed, "low": 900.0, "high": 1100.0} for key in shift}
    metrics = {
        "utility": dict.fromkeys(shift),
        "extra": {"elo": elo, "structure": {}, "conditions": {}},
        "probe": {},
        "align": {"same_users": {"mmd_after": 0.01}},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    steps = [{"command": ["fit", "--stage", "align", "x=1"], "seconds": 2.0, "peak_mb": 300.0}]
    record = {"finished": finished, "steps": steps, "trial": None}
    (work / "runs" / name / "steps.json").write_text(json.dumps(record))


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    for seed in (0, 1):
        save_run(tmp_path, f"main-{seed}", own=1.0, seed=seed)
    save_run(tmp_path, "worse", own=0.7)
    save_run(tmp_path, "s1", own=1.0)
    save_run(tmp_path, "s0", own=0.5)
    return read_plan(path), tmp_path


def test_the_claim_holds_where_every_rival_is_beaten(study):
    plan, work = study
    found = collect(plan, work=work)
    assert found["seeds"] == [0, 1]
    verdict = found["main"]["verdict"]
    assert verdict["holds"]
    assert verdict["beaten"] == ["base", "other"]  # words and real see the truth
    assert found["main"]["own_minus"]["base"]["mean"] == pytest.approx(1, abs=0.02)
    assert found["main"]["own_minus"]["words"]["high"] < 0
    assert found["main"]["conditions"]["own"]["elo"] == 1000.5
    assert found["main"]["conditions"]["own"]["liked_hits"]["num_users"] == USERS - 1
    assert found["missing"] == ["never"]
    assert len(found["worst"]) == 6


def test_ablations_are_paired_with_the_main_run_of_their_seed(study):
    plan, work = study
    [row] = collect(plan, work=work)["ablations"]
    assert row["minus_main"]["mean"] == pytest.approx(-0.3, abs=0.02)
    assert row["minus_main"]["high"] < 0
    # Users differ by .1, but the same in both runs: the pairing takes it out.
    assert row["minus_main"]["high"] - row["minus_main"]["low"] < 0.03
    assert row["align"]["mmd_after"] == 0.01


def test_claims_are_said_to_agree_disagree_or_not_measured(study):
    plan, work = study
    said = [one["verdict"] for one in collect(plan, work=work)["claims"]]
    assert said == ["agrees", "not measured"]


def test_curves_are_in_order_of_x(study):
    plan, work = study
    points = collect(plan, work=work)["curves"]["user_scale"]
    assert [point["x"] for point in points] == [0.5, 1]
    assert points[0]["utility"]["mean"] < points[1]["utility"]["mean"]


def test_a_lost_comparison_and_an_open_one_are_said(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    save_run(tmp_path, "main-0", own=-1.0)
    verdict = collect(read_plan(path), work=tmp_path)["main"]["verdict"]
    assert not verdict["holds"]
    assert verdict["lost_to"] == ["base", "other"]


def test_runs_on_other_users_or_without_tables_are_refused(study):
    plan, work = study
    (work / "runs" / "worse" / "report" / "users.json").unlink()
    with pytest.raises(DataError, match="extra.figures=true"):
        collect(plan, work=work)
    import shutil

    shutil.rmtree(work / "runs" / "worse")
    save_run(work, "worse", own=0.7, users=USERS - 1)
    with pytest.raises(DataError, match="other users or prompts than the main one"):
        collect(plan, work=work)
    with pytest.raises(DataError, match="no run of the main table is finished"):
        collect(plan, work=work / "elsewhere")


def test_the_report_is_written_in_both_forms(study, capsys):
    plan, work = study
    root = work / "runs" / "main-0" / "report" / "pictures"
    generator = torch.Generator().manual_seed(0)
    users = []
    for i in range(USERS):
        names = ("own", "base", "liked", "disliked")
        sets = {name: torch.rand(1, 3, 8, 8, generator=generator) for name in names}
        files = save_user_pictures(root, name=f"{i}", sets=sets)
        users.append(
            PictureUser(
                user_id=f"u{i}", liked=files["liked"], disliked=files["disliked"], prompts=("a fox",),
                pictures={name: files[name] for name in ("own", "base")},
            )
        )  # fmt: skip
    write_index(root, users=users)
    report = write_study(plan, work=work, out=work / "study")
    html = report.places["html"].read_text(encoding="utf-8")
    markdown = report.places["markdown"].read_text(encoding="utf-8")
    for words in ("Main table", "Ablations", "Where it fails", "What it cost", "The study's claim"):
        assert words in html.replace("&#x27;", "'"), words
        assert words in markdown, words
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg", "", html)
    assert "Not finished, so not in here: never" in markdown
    files = sorted(path.name for path in (work / "study" / "study_files").iterdir())
    assert files == sorted(
        ["curve-user_scale.svg", *(f"user-{i}.png" for i in range(4)), *(f"worst-{i}.png" for i in range(6))]
    )
    for name in re.findall(r"\]\((study_files/[^)]+)\)", markdown):
        assert (work / "study" / name).is_file()
    rows = [line for line in markdown.splitlines() if line.startswith("| base |")]
    assert len(rows) == 2
    words = ["evaluate", "study", "--plan", str(plan.path), "--work", str(work), "--report-only"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "the claim of the main table holds" in printed
    assert "not finished: never" in printed


def test_presets_that_were_not_run_stand_with_their_command(study):
    plan, work = study
    assert collect(plan, work=work)["absent"] == []
    plan.path.write_text(PLAN + "presets: {paper: {about: large models, words: {}}}\n")
    found = collect(read_plan(plan.path), work=work)
    command = (
        f"prefgen evaluate study --plan {plan.path} --work work/paper/study --preset paper "
        "--shards work/paper/shards"
    )
    assert found["absent"] == [{"preset": "paper", "about": "large models", "command": command}]
    text = write_study(read_plan(plan.path), work=work, out=work / "out").places["markdown"].read_text()
    assert "## Not measured here" in text
    assert f"| paper | large models | {command} |" in text
    paper = collect(read_plan(plan.path, preset="paper", shards=work), work=work)
    assert (paper["preset"], paper["absent"]) == ("paper", [])
    assert paper["about"] == "a try; large models"


def test_blocks_say_the_same_in_both_forms_and_escape():
    blocks = [
        Heading(words="A <b>"), Paragraph(words="x & y"), Grid(head=("a", "b"), rows=(("1|2", "3"),)),
        Figure(name="f.svg", data=b"<svg/>", caption="c"),
    ]  # fmt: skip
    html = to_html(blocks, title="t")
    assert "A &lt;b&gt;" in html
    assert "data:image/svg+xml;base64," in html
    markdown = to_markdown(blocks, folder="f")
    assert "| 1/2 | 3 |" in markdown
    assert "![c](f/f.svg)" in markdown


def test_a_curve_of_one_point_is_drawn_too():
    svg = curve_plot({"own": [{"x": 1.0, "mean": 0.5, "low": 0.4, "high": 0.6}]}, x_label="x", y_label="y")
    assert svg.startswith(b"<svg")
    assert b"nan" not in svg
