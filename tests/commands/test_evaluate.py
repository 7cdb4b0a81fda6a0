"""``prefgen evaluate`` as typed, in process, on a tiny workdir."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from prefgen.cli import main
from prefgen.evaluate.judges import Judge
from prefgen.testing.mllm import tiny_mllm
from prefgen.testing.study import save_tiny_workdir
from prefgen.testing.viper import save_tiny_viper

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_tiny_workdir(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def words(workdir):
    models = workdir / "models"
    return [
        f"workdir={workdir}",
        f"model.pipeline={models / 'pipeline'}",
        f"model.mllm={models / 'mllm'}",
        f"model.judge={models / 'judge.safetensors'}",
        "model.precision=float32",
        "evaluate.num_users=4",
        "evaluate.num_steps=2",
        "evaluate.num_resamples=200",
        "evaluate.minimum_accuracy=0",
        "evaluate.attribution=Made <by> us",
    ]


@pytest.fixture(scope="module")
def report(workdir, words):
    """The folder of a first report."""
    assert main(["evaluate", *words]) == 0
    return workdir / "report"


@pytest.fixture(scope="module")
def metrics(report):
    return json.loads((report / "metrics.json").read_text())


def refused(capsys, *arguments):
    assert main(["evaluate", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefgen: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("prefgen: error: ")


def test_everything_the_issue_names_is_there(metrics):
    conditions = {"base", "own", "other", "image_only", "words", "real"}
    assert set(metrics["utility"]) == set(metrics["prompt_fidelity"]) == conditions
    for name in (
        "oracle", "vqa_accuracy", "vqa_before_lora", "history_blind", "vqa_of_oracle",
        "own_vs_base", "own_vs_other", "own_vs_image_only", "own_vs_words", "own_vs_real",
        "prompt_fidelity_kept",
    ):  # fmt: skip
        assert metrics[name]["low"] <= metrics[name]["mean"] <= metrics[name]["high"], name
        assert metrics[name]["num_users"] == 4, name
    assert metrics["oracle"]["mean"] > 0.9  # every user shows one hue on each side
    assert metrics["num_questions"] == 32
    for task in ("inter", "intra"):
        assert metrics["probe"][task]["low_above_chance"] == pytest.approx(0.3)
        assert metrics["probe"][task]["control"]["mean"] == 0.26
    assert metrics["align"]["same_users"]["recall_1"] == {"mean": 0.4, "low": 0.4, "high": 0.4}
    assert metrics["align"]["same_users"]["mmd_before"] == 0.2
    assert {name: found["steps"] for name, found in metrics["stages"].items()} == dict.fromkeys(
        ("vqa", "probe", "align", "inject", "inject_image_only"), 7
    )
    assert metrics["stages"]["inject"]["bytes"] > 1000
    for distance in ("pixels", "embedding"):
        assert set(metrics["copying"][distance]) == conditions - {"real"} | {"history"}
    assert len(metrics["worst_users"]) == 3


def test_the_demos_thresholds_all_find_their_figure(report):
    command = [sys.executable, ROOT / "tools" / "check_demo.py", report / "metrics.json"]
    thresholds = ROOT / "configs" / "mini" / "demo_thresholds.yaml"
    done = subprocess.run([*command, thresholds], capture_output=True, text=True, check=False)
    assert done.returncode == 1  # untrained models
    assert "missing" not in done.stdout
    assert "has no low and high" not in done.stdout
    assert "ok   probe.inter.low_above_chance" in done.stdout


def test_what_is_missing_is_said_in_words(metrics):
    assert metrics["align"]["independent"] is None
    [words] = metrics["missing"]
    assert "align.pairing=independent" in words


def test_two_runs_give_the_same_bytes(words, report, tmp_path, capsys):
    nothing_kept = f"data.feature_cache={tmp_path / 'features'}"
    assert main(["evaluate", *words, f"out={tmp_path / 'again'}", nothing_kept]) == 0
    out = capsys.readouterr().out
    assert f"report: {tmp_path / 'again' / 'report.html'}" in out
    assert "own against other" in out
    for name in ("metrics.json", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (report / name).read_bytes(), name
    assert main(["evaluate", *words, f"out={tmp_path / 'other'}", "seed=1"]) == 0
    assert (tmp_path / "other" / "metrics.json").read_bytes() != (report / "metrics.json").read_bytes()


def test_seconds_are_kept_apart(report):
    assert set(json.loads((report / "timing.json").read_text())["seconds"]) == {
        "questions", "judge on known drawings", "drawing", "judging",
    }  # fmt: skip


class Page(HTMLParser):
    """Sources of pictures, headings, and whether every tag is closed."""

    VOID = {"meta", "img", "line", "circle"}

    def __init__(self, text):
        super().__init__()
        self.sources, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_one_file_with_its_pictures_inside(report):
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    # 4 users x (3 strips + 2 prompts x 6 conditions) and 2 heat maps; the worst are among the first
    assert len(page.sources) == 4 * 15 + 2
    assert "http" not in text
    assert "Made <by> us" in page.words
    assert "not fitted" in page.words


def test_scale_0_makes_own_the_base_model(words, tmp_path):
    out = tmp_path / "zero"
    assert main(["evaluate", *words, f"out={out}", "evaluate.user_scale=0"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    for other in ("base", "other", "image_only"):
        assert metrics[f"own_vs_{other}"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "num_users": 4}
    assert metrics["utility"]["own"] == metrics["utility"]["base"]


@pytest.mark.slow
def test_image_only_may_be_left_out_and_bfloat16_works(words, tmp_path):
    out = tmp_path / "less"
    more = ["model.inject_image_only=", f"out={out}", "evaluate.num_users=9", "evaluate.num_draws=2"]
    kept = [word for word in words if not word.startswith(("evaluate.num_users", "model.precision"))]
    assert main(["evaluate", *kept, *more, "model.precision=bfloat16"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert "own_vs_image_only" not in metrics
    assert any("9 users were asked for, 4 found" in words for words in metrics["missing"])
    assert any("image-only" in words for words in metrics["missing"])


def test_a_judge_that_reads_nothing_makes_ties_and_says_so(words, tmp_path):
    out = tmp_path / "blind"
    kept = [word for word in words if not word.startswith("evaluate.minimum_accuracy")]
    assert main(["evaluate", *kept, f"out={out}", "evaluate.minimum_accuracy=1"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    left_out = set(metrics["judge"]["left_out"])
    assert left_out
    assert left_out | set(metrics["judge"]["judged"]) | set(metrics["judge"]["never_shown"]) == {
        "red", "yellow", "green", "cyan", "blue", "magenta",
    }  # fmt: skip
    assert left_out.isdisjoint(metrics["judge"]["judged"])


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("shards/index.json", "no history shards at"),
        ("vqa/lora", "run 'prefgen fit --stage vqa workdir="),
        ("probe/probe.json", "run 'prefgen fit --stage probe workdir="),
        ("embeddings/index.json", "run 'prefgen predict --stage probe workdir="),
        ("align/projector.safetensors", "run 'prefgen fit --stage align workdir="),
        ("inject/user_adapter.safetensors", "run 'prefgen fit --stage inject workdir="),
        ("inject_image_only/user_adapter.safetensors", "inject_image_only.yaml"),
    ],
)
def test_what_is_not_there_is_named_with_the_command_that_makes_it(
    workdir, words, tmp_path, capsys, gone, message
):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    path = copy / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert message in refused(capsys, f"workdir={copy}", *words[1:])


def test_a_judge_of_other_data_and_a_foreign_adapter_are_refused(words, workdir, tmp_path, capsys):
    with torch.random.fork_rng(devices=[]):
        judge = Judge(groups={"palette": ("red",)}, subjects=("a submarine",))
    judge.save(tmp_path / "judge.safetensors")
    kept = [word for word in words if not word.startswith("model.judge")]
    error = refused(capsys, *kept, f"model.judge={tmp_path / 'judge.safetensors'}", f"out={tmp_path}/r")
    assert "the judge can name none of the" in error
    other = save_tiny_workdir(tmp_path / "other", seed=5)
    error = refused(capsys, *words, f"model.inject={other / 'inject'}", f"out={tmp_path}/r")
    assert "was trained with another" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate.num_user=3"], "unknown key 'evaluate.num_user' for prefgen evaluate. Did you mean"),
        (["evaluate.num_users=1"], "evaluate.num_users=1 must be at least 2"),
        (["model.precision=bf17"], "'bf17' is not one of float32, bfloat16"),
        (["--evaluate.num_users=3"], "overrides are written without dashes: evaluate.num_users=3"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    assert message in refused(capsys, *words)


def test_keys_dry_run_and_mmd(capsys):
    assert main(["evaluate", "--keys"]) == 0
    assert "evaluate.num_users (int; default 64)" in capsys.readouterr().out
    assert main(["evaluate", "--dry-run", "workdir=work/x"]) == 0
    assert "out: work/x/report" in capsys.readouterr().out
    assert "required: --a" in refused(capsys, "mmd").replace("arguments are ", "")
    with pytest.raises(SystemExit) as leaving:
        main(["evaluate", "mmd", "--help"])
    assert leaving.value.code == 0
    assert "usage: prefgen evaluate mmd" in capsys.readouterr().out


def test_more_on_request_and_the_plain_figures_stay(words, report, metrics, tmp_path):
    out = tmp_path / "more"
    more = [
        f"out={out}", "extra.figures=true", "extra.save_pictures=true", "extra.num_set_resamples=5",
        "extra.conditions=[image_mean,feedback]",
    ]  # fmt: skip
    assert main(["evaluate", *words, *more]) == 0
    found = json.loads((out / "metrics.json").read_text())
    assert "extra" not in metrics
    assert not (report / "users.json").exists()
    assert not (report / "pictures").exists()
    # What stood there before stands there still, figure by figure.
    for name in ("own_vs_base", "own_vs_words", "vqa_accuracy", "judge", "worst_users", "settings"):
        assert found[name] == metrics[name], name
    assert set(found["utility"]) - set(metrics["utility"]) == {"image_mean", "feedback"}
    assert found["own_vs_feedback"]["num_users"] == 4
    extra = found["extra"]
    assert set(extra["margins"]["utility"]) == set(found["utility"]) - {"own"}
    assert all(row["p"] <= row["p_holm"] <= 1 for row in extra["margins"]["utility"].values())
    assert set(extra["sets"]["fid"]) == set(found["utility"]) - {"real"}
    assert set(extra["elo"]) == set(found["utility"])
    assert 0 <= extra["structure"]["cka"] <= 1
    tables = json.loads((out / "users.json").read_text())
    assert len(tables["users"]) == 4
    mean = sum(tables["tables"]["utility"]["own"]) / 4
    assert mean == pytest.approx(found["utility"]["own"]["mean"], abs=1e-5)
    index = json.loads((out / "pictures" / "pictures.json").read_text())
    assert len(index["users"]) == 4
    assert set(index["users"][0]["pictures"]) == set(found["utility"])
    text = (out / "report.html").read_text(encoding="utf-8")
    assert Page(text).open == []
    assert "Further figures" in text
    assert "Further figures" not in (report / "report.html").read_text(encoding="utf-8")
    seconds = json.loads((out / "timing.json").read_text())["seconds"]
    assert {"feedback", "image_mean", "further figures"} <= set(seconds)


@pytest.mark.slow
def test_an_mllm_and_vipers_proxy_judge_on_request(workdir, words, report, tmp_path, capsys):
    other = tiny_mllm(tmp_path / "mllm", seed=7)
    viper = save_tiny_viper(tmp_path / "viper")
    out = tmp_path / "judged"
    more = [f"out={out}", f"extra.scorers=[viper:{viper}]", "extra.num_set_resamples=0"]
    assert main(["evaluate", *words, *more, f"extra.mllm_judge={other}"]) == 0
    extra = json.loads((out / "metrics.json").read_text())["extra"]
    judge = extra["mllm_judge"]
    assert judge["independent"] is True
    assert (extra["settings"]["mllm_judge"], extra["settings"]["scorers"]) == ("idefics3", ["viper"])
    assert set(judge["own_against"]) == {"base", "other", "image_only", "words", "real"}
    row = judge["own_against"]["base"]
    assert row["wins"]["low"] <= row["wins"]["mean"] <= row["wins"]["high"]
    assert row["wins"]["num_users"] == 4
    tables = json.loads((out / "users.json").read_text())["tables"]
    assert sum(tables["mllm_wins"]["base"]) / 4 == pytest.approx(row["wins"]["mean"], abs=1e-5)
    assert all(0 < value < 1 for value in tables["viper"]["own"])
    text = (out / "report.html").read_text(encoding="utf-8")
    assert Page(text).open == []
    assert "What an MLLM would choose for the user" in text
    assert "not independent" not in text
    assert "What an MLLM would choose" not in (report / "report.html").read_text(encoding="utf-8")
    own = workdir / "models" / "mllm"
    assert "is model.mllm, from which stage vqa trained" in refused(capsys, *words, f"extra.mllm_judge={own}")
