"""Plans as files, and their runs: placeholders, mistakes, resuming, failures, trials."""

import json
import sys
from pathlib import Path

import pytest

from prefgen.cli import main
from prefgen.errors import ConfigError, DataError
from prefgen.study import runner
from prefgen.study.plan import read_plan
from prefgen.study.runner import StepBook, read_book, run_plan

ROOT = Path(__file__).parents[2]
PLAN = """\
version: 1
about: a try
words:
  show: config --stage align
  both: "{show} {seedword}"
  seedword: --preset mini
runs:
  - name: first
    steps: ["{both}", "config --stage {stage}"]
  - name: second
    seeds: [3, 4]
    steps: ["config --out {run} --seed {seed} --near {runs}/first --name {name}"]
"""


def write(tmp_path, text=PLAN):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return path


def test_words_and_places_are_put_in_and_blanks_in_paths_stay_whole(tmp_path):
    plan = read_plan(write(tmp_path, PLAN.replace("{stage}", "probe")))
    work = tmp_path / "with blank"
    first, third, fourth = plan.runs
    assert plan.commands(first, work=work) == [
        ["config", "--stage", "align", "--preset", "mini"],
        ["config", "--stage", "probe"],
    ]
    assert (third.folder, fourth.folder) == ("second-3", "second-4")
    [command] = plan.commands(fourth, work=work)
    assert command == [
        "config", "--out", str(work / "runs" / "second-4"), "--seed", "4", "--near", f"{work}/runs/first",
        "--name", "second",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("version: 1", "version: 2"), "expected a mapping with version: 1"),
        (("about:", "abut:"), "unknown key 'abut'"),
        (("name: second", "name: first\n    table: mian"), "table 'mian' is not one of none, main"),
        (("name: second\n    seeds: [3, 4]", "name: first"), "run 'first' stands there twice"),
        (('    steps: ["{both}"', '    stps: ["{both}"'), "needs name and steps"),
        (("runs:", "claims: [{words: w, better: first, than: third}]\nruns:"), "run 'third', which is not"),
        (("runs:", "runs: ["), "is not YAML"),
        (("name: first\n", "name: first\n    trial: {name: x}\n"), "a trial needs figure, metrics"),
    ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path, change, message):
    text = PLAN.replace(*change)
    assert text != PLAN
    with pytest.raises(ConfigError, match=message):
        read_plan(write(tmp_path, text))


def test_an_unknown_placeholder_is_named(tmp_path):
    plan = read_plan(write(tmp_path))
    with pytest.raises(ConfigError, match="no placeholder 'stage' in .*known: best, both, name, plan"):
        plan.commands(plan.runs[0], work=tmp_path)


@pytest.mark.parametrize(
    "name", ["reproduce", "stamps", pytest.param("reproduce_full", marks=pytest.mark.slow)]
)
def test_the_shipped_plans_name_known_settings_only(name, tmp_path):
    """Every kind of command in the plans is checked as the command line would check it."""
    from prefgen.config import load_config
    from prefgen.study.config import load_evaluate_config

    plan = read_plan(ROOT / "studies" / f"{name}.yaml")
    checked = set()
    for run in plan.runs:
        commands = plan.commands(run, work=tmp_path, values={"best": "1e-3"})
        for value in run.trial.values if run.trial else ():
            commands += plan.trial_commands(run, work=tmp_path, value=value)
        for command in commands:
            # Places and seeds aside, most commands are alike; each kind is checked once.
            kind = tuple(word for word in command if "/" not in word and not word.startswith("seed="))
            if kind in checked:
                continue
            checked.add(kind)
            overrides = [word for word in command if "=" in word]
            if "--stage" in command:
                file = Path(command[command.index("--config") + 1]) if "--config" in command else None
                load_config(command[command.index("--stage") + 1], file=file, overrides=overrides)
            elif command[0] == "evaluate":
                config = load_evaluate_config(overrides=overrides)
                assert config.extra.figures
                assert config.out.endswith(f"{run.folder}/report")
                assert config.seed == 0
    assert len(checked) >= (9 if name == "stamps" else 13)


def commands_of(plan, run, *, work):
    commands = [plan.trial_commands(run, work=work, value=v) for v in (run.trial.values if run.trial else ())]
    return [*sum(commands, []), *plan.commands(run, work=work, values={"best": "1e-3"})]


@pytest.mark.parametrize("name", ["reproduce", "reproduce_full"])
def test_the_shipped_plans_read_only_what_earlier_runs_have_written(name, tmp_path):
    plan = read_plan(ROOT / "studies" / f"{name}.yaml")
    runs, made = tmp_path / "runs", set()
    for run in plan.runs:
        for command in commands_of(plan, run, work=tmp_path):
            for word in command:
                place = Path(word.partition("=")[2] or word)
                if place.is_relative_to(runs):
                    (folder, *rest) = place.relative_to(runs).parts
                    needed = f"{folder}/{rest[0]}" if rest else folder
                    known = folder == run.folder or needed == "data/features" or needed in made
                    assert known, f"{run.folder}: nothing has written {needed} before {' '.join(command)}"
        made |= _written(commands_of(plan, run, work=tmp_path), folder=run.folder)


def _written(commands, *, folder):
    """Folders a run leaves behind, as its commands say."""
    found = {folder}
    for command in commands:
        if command[0] == "data":
            found |= {f"{folder}/raw", f"{folder}/shards"}
        elif command[0] == "predict":
            found.add(f"{folder}/embeddings")
        elif command[0] == "fit" and not any(word.startswith("run_dir=") for word in command):
            image_only = any("inject_image_only" in word for word in command)
            found.add(f"{folder}/{'inject_image_only' if image_only else command[2]}")
    return found


ABLATIONS = {
    "loss of stage 3": {
        "loss_mse", "loss_cosine", "loss_infonce", "loss_sliced", "loss_both", "loss_none", "independent",
        "permuted",
    },
    "kernel of the MMD": {"kernel_laplacian", "kernel_rq", "kernel_imq", "kernel_energy"},
    "bandwidth of the MMD": {"bandwidth_half", "bandwidth_double", "bandwidth_one"},
    "users in one MMD": {"group_8", "group_32", "group_128"},
    "parts of e_u": {"no_sem", "no_core", "no_image", "only_sem", "only_core", "only_image"},
    "layers of sem": {"top_four", "middle_four", "all_layers"},
    "pooling of sem": {"pool_image_mean", "pool_mean", "pool_max"},
    "language model": {"no_vqa"},
    "disliked images": {"no_dislikes", "no_dislikes_vqa"},
    "training users of stages align and inject": {"users_32", "users_100", "users_320"},
    "learning rate": {"untuned"},
}  # fmt: skip
"""What the full study leaves out or exchanges, each as one run and three seeds."""


def test_the_full_plan_holds_every_ablation_over_three_seeds():
    plan = read_plan(ROOT / "studies" / "reproduce_full.yaml")
    rows = [run for run in plan.runs if run.table == "ablation"]
    found = {group: {run.name for run in rows if run.group == group} for group in {r.group for r in rows}}
    assert found == ABLATIONS
    assert all([run.seed for run in rows if run.name == name] == [0, 1, 2] for name in {r.name for r in rows})
    curves = {run.curve: [] for run in plan.runs if run.table == "curve"}
    for run in plan.runs:
        if run.table == "curve":
            curves[run.curve].append(run.x)
    assert curves["liked and disliked references"] == [1, 2, 4, 8]
    assert curves["user_scale"] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2]


def test_the_short_plan_keeps_eight_ablations_of_the_full_one():
    short, full = (read_plan(ROOT / "studies" / f"{name}.yaml") for name in ("reproduce", "reproduce_full"))
    rows = [run for run in short.runs if run.table == "ablation"]
    assert len(rows) == 8
    assert {run.name for run in rows} <= {run.name for run in full.runs}


def test_layers_given_by_hand_are_layers_of_the_mini_mllm():
    import prefgen

    config = json.loads((Path(prefgen.__file__).parent / "assets/mini/mllm/config.json").read_text())
    layers = config["text_config"]["num_hidden_layers"]
    plan = read_plan(ROOT / "studies" / "reproduce_full.yaml")
    given = {
        run.name: word.partition("=")[2]
        for run in plan.runs
        for command in plan.commands(run, work=Path("work"), values={"best": "1"})
        for word in command
        if word.startswith("probe.sem_layers=")
    }
    every = list(range(1, layers + 1))
    assert json.loads(given["read_all_layers"]) == every
    assert json.loads(given["read_middle_four"]) == every[layers // 2 - 2 : layers // 2 + 2]
    assert all(json.loads(given[f"read_pool_{name}"]) == every[-4:] for name in ("mean", "max", "image_mean"))


def counted(monkeypatch, *, codes=()):
    """run_command replaced: what was called, with the given exit codes in order, then 0."""
    calls, codes = [], list(codes)

    def fake(command, *, log, lock=None):
        del lock
        calls.append(command[0])
        log.write_text("prefgen: error: it broke\n")
        return (codes.pop(0) if codes else 0), 2048

    monkeypatch.setattr(runner, "run_command", fake)
    return calls


def test_what_is_done_is_not_done_again_and_a_change_begins_there(tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    for _ in range(2):
        book = StepBook(tmp_path / "r")
        for word in ("a", "b", "c"):
            book.do([word])
        book.close()
    assert calls == ["a", "b", "c"]
    record = read_book(tmp_path / "r")
    assert record["finished"]
    assert record["steps"][1] == {"command": ["b"], "seconds": 0.0, "peak_mb": 2.0}
    book = StepBook(tmp_path / "r")
    for word in ("a", "B", "c"):
        book.do([word])
    assert calls[3:] == ["B", "c"]
    assert not read_book(tmp_path / "r")["finished"]


def test_a_kill_between_two_steps_forgets_neither(tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    StepBook(tmp_path / "r").do(["a"])
    book = StepBook(tmp_path / "r")
    book.do(["a"])
    book.do(["b"])
    again = StepBook(tmp_path / "r")
    again.do(["a"])
    again.do(["b"])
    assert calls == ["a", "b"]


def test_a_run_that_fails_stops_no_other(tmp_path, monkeypatch):
    text = PLAN.replace("{stage}", "probe").replace(
        " --out {run} --seed {seed} --near {runs}/first --name {name}", ""
    )
    plan = read_plan(write(tmp_path, text))
    calls = counted(monkeypatch, codes=[0, 2])
    outcome = run_plan(plan, work=tmp_path)
    assert outcome.done == ("second-3", "second-4")
    assert "ended with 2: it broke (" in outcome.failed["first"]
    assert run_plan(plan, work=tmp_path, only=["first"]).done == ("first",)
    assert len(calls) == 5  # the first step of first was not done again
    with pytest.raises(ConfigError, match="no run 'third'.*runs: first, second"):
        run_plan(plan, work=tmp_path, only=["third"])


def test_a_trial_takes_the_best_value_and_keeps_what_it_found(tmp_path, monkeypatch):
    text = PLAN.replace(
        "name: first\n",
        """name: first
    trial:
      name: rate
      values: [1, 2, 3]
      steps: ["config {value}"]
      metrics: "{run}/{value}.json"
      figure: fit|loss
""",
    ).replace("config --stage {stage}", "take {best}")
    plan = read_plan(write(tmp_path, text))
    seen = []

    def fake(command, *, log, lock):
        del log, lock
        seen.append(list(command))
        if len(command) == 2 and command[0] == "config":
            loss = {"1": 0.5, "2": 0.2, "3": 0.9}[command[1]]
            (tmp_path / "runs" / "first" / f"{command[1]}.json").write_text(
                json.dumps({"fit": {"loss": loss}})
            )
        return 0, 1

    monkeypatch.setattr(runner, "run_command", fake)
    assert run_plan(plan, work=tmp_path, only=["first"]).done == ("first",)
    assert seen[-1] == ["take", "2"]
    trial = read_book(tmp_path / "runs" / "first")["trial"]
    assert trial["best"] == "2"
    assert trial["found"] == {"1": 0.5, "2": 0.2, "3": 0.9}


def test_real_commands_run_and_their_cost_is_kept(tmp_path):
    log = tmp_path / "log"
    code, peak = runner.run_command(["config", "--stage", "align"], log=log)
    assert code == 0
    assert peak > 5000
    assert "align.group_size" in log.read_text()
    code, _ = runner.run_command(["config", "--stage", "algin"], log=log)
    assert code == 2
    assert runner._last_line(log).startswith("unknown stage 'algin'")


def test_one_study_at_a_time_and_a_step_holds_the_lock(tmp_path):
    import subprocess

    with runner.locked(tmp_path) as lock:
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
        with pytest.raises(ConfigError, match="is running in"), runner.locked(tmp_path):
            pass
    # The study is gone, its step is not.
    with pytest.raises(ConfigError, match="a step of one that was killed"), runner.locked(tmp_path):
        pass
    left.communicate(b"\n")
    with runner.locked(tmp_path):
        pass


def test_a_torn_book_is_named(tmp_path):
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(DataError, match="steps.json is torn; delete it"):
        read_book(tmp_path)


def test_dry_run_prints_every_command(tmp_path, capsys):
    plan = write(tmp_path, PLAN.replace("{stage}", "probe"))
    assert main(["evaluate", "study", "--plan", str(plan), "--work", str(tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "# second-3\nprefgen config --out" in printed
    assert not (tmp_path / "runs").exists()
    assert sys.executable not in printed


def test_the_same_study_with_another_preset(tmp_path):
    from prefgen.config import load_config
    from prefgen.study.config import load_evaluate_config

    path, shards = ROOT / "studies" / "reproduce.yaml", tmp_path / "own shards"
    plain, paper = read_plan(path), read_plan(path, preset="paper", shards=shards)
    names = [run.folder for run in plain.runs]
    assert names[0] == "data"
    assert [run.folder for run in paper.runs] == names[1:]
    assert paper.claims == plain.claims
    commands = [
        (run.name, command) for run in paper.runs for command in paper.commands(run, work=tmp_path / "w")
    ]
    for name, command in commands:
        assert not any("configs/mini" in word or "runs/data/shards" in word for word in command), name
        file, overrides = None, [word for word in command if "=" in word]
        if "--config" in command:
            file = Path(command[command.index("--config") + 1])
            assert str(file).endswith("configs/paper/inject_image_only.yaml")
        else:
            assert command[1:3] == ["--preset", "paper"]
        if "--stage" in command:
            stage = command[command.index("--stage") + 1]
            assert load_config(stage, preset="paper", file=file, overrides=overrides).seed in (0, 1, 2)
        else:
            assert load_evaluate_config(preset="paper", overrides=overrides).model.device == "auto"
    taste = next(command for name, command in commands if name == "taste")
    assert f"data.shards={shards}" in taste
    steps = [word for _, command in commands for word in command if word.startswith("trainer.max_steps=300")]
    assert steps == []
    assert "evaluate.num_prompts=4" in next(c for n, c in commands if n == "main" and c[0] == "evaluate")
    assert "mini" not in paper.about


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "paper"}, "pass --shards DIR, as 'prefgen data build' makes it"),
        ({"preset": "sd15", "shards": Path("x")}, "presets: mini, paper"),
    ],
)
def test_presets_that_do_not_fit_a_plan_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        read_plan(ROOT / "studies" / "reproduce.yaml", **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("presets: [paper]", "presets must map names"),
        ("presets: {paper: {words: {}}}", "preset paper needs about and words"),
        ("presets: {paper: {about: x, words: {}, steps: 3}}", "unknown key 'steps'"),
    ],
)
def test_presets_of_a_plan_are_checked(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_plan(write(tmp_path, PLAN.replace("runs:", f"{text}\nruns:")))
