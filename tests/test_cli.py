"""The command line: every row of the table of answers, exit codes, help, and no torch before it is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import prefgen.commands.fit as fit_command
import prefgen.stages as stages
from prefgen import __version__
from prefgen.cli import main
from prefgen.config import configs_folder
from prefgen.stages import StageEntry

WATCH = """
import sys, json
from prefgen.cli import main
code = main(sys.argv[1:])
heavy = sorted({"torch", "lightning", "transformers", "diffusers", "numpy"} & set(sys.modules))
print("HEAVY", heavy)
sys.exit(code)
"""


def spoken(*words, cwd=None):
    """The real command line in a process of its own, and what it imported."""
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, "-c", WATCH, *words],
        capture_output=True, text=True, timeout=60, cwd=cwd, env=environment, check=False,
    )  # fmt: skip


def refused(capsys, *words):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("prefgen: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("prefgen: error: ").rstrip("\n")


@pytest.fixture
def align_is_toy(monkeypatch, tmp_path):
    """Stage align made small: the frame's answers do not hang on a stage's own keys."""
    entry = StageEntry(config="toy_config:ToyConfig", data="toy_stage:ToyData", module="toy_stage:ToyModule")
    monkeypatch.setitem(stages.STAGES, "align", entry)
    file = tmp_path / "align.yaml"
    file.write_text("toy: {width: 4}\n")
    return ("fit", "--stage", "align", "--config", str(file), f"workdir={tmp_path}/w")


def test_row_1_trains(align_is_toy, tmp_path, capsys):
    (tmp_path / "w" / "shards").mkdir(parents=True)
    (tmp_path / "w" / "shards" / "index.json").write_text("{}")
    assert main([*align_is_toy, "trainer.max_steps=2", "data.batch_size=3"]) == 0
    text = (tmp_path / "w" / "toy" / "config.yaml").read_text()
    assert "max_steps: 2\n" in text
    assert "batch_size: 3\n" in text
    places = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert places.keys() == {"artefact", "checkpoint", "log", "metrics"}
    assert all(Path(place).exists() for place in places.values())


ROWS = [
    (
        ("data.bach_size=64",),
        "unknown key 'data.bach_size' for stage 'align'. Did you mean 'data.batch_size'?",
    ),
    (("data.batch_size=abc",), "data.batch_size: expected int, got 'abc'"),
    (
        ("trainer.precision=bf17",),
        "trainer.precision: 'bf17' is not one of 32-true, bf16-true, bf16-mixed, 16-mixed, auto",
    ),
    (("--data.batch_size=64",), "overrides are written without dashes: data.batch_size=64"),
]


@pytest.mark.parametrize(("words", "message"), ROWS)
def test_rows_of_keys_and_values(align_is_toy, capsys, words, message):
    assert refused(capsys, *align_is_toy, *words) == message


def test_row_without_inputs(align_is_toy, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *align_is_toy[:-1], "workdir=work/x") == (
        "no embedding shards at work/x/shards; "
        "run 'prefgen predict --stage probe workdir=work/x' first or pass data.shards=PATH"
    )


def test_row_unknown_stage(capsys):
    expected = "unknown stage 'algin'; stages: vqa, probe, align, inject. Did you mean 'align'?"
    assert refused(capsys, "fit", "--stage", "algin") == expected


@pytest.mark.parametrize(
    "words",
    [
        ("fit", "--stage", "algin"),
        ("fit", "--stage", "align", "data.bach_size=64"),
        ("fit", "--stage", "align", "--data.batch_size=64"),
        ("fit", "--stage", "align", "workdir=nowhere"),
        ("fit", "--stage", "align", "trainer.precision=bf17"),
    ],
)
def test_real_processes_refuse_before_torch(words, tmp_path):
    done = spoken(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("prefgen: error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == "HEAVY []\n"


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("fit", "--help"),
        ("config", "--stage", "align"),
        ("fit", "--stage", "align", "--dry-run"),
    ],
)
def test_helping_imports_nothing_heavy(words):
    watch = WATCH.replace("code = main(sys.argv[1:])", "code = 0\ntry:\n    code = main(sys.argv[1:])\n"
                          "except SystemExit as stop:\n    code = stop.code")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", watch, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("HEAVY []\n")
    assert len(done.stdout.splitlines()) > 10


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "prefgen", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"prefgen {__version__}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fti",), "unknown command 'fti'; commands: data, fit,"),
        (("fit",), "the following arguments are required: --stage"),
        (("fit", "--stage"), "argument --stage: expected one argument"),
        (
            ("fit", "--stage", "align", "--prset", "mini"),
            "unknown option '--prset'. Did you mean '--preset'?",
        ),
        (("fit", "--stage", "align", "--pre", "mini"), "unknown option '--pre'"),
        (("fit", "--stage", "align", "--seed=3"), "overrides are written without dashes: seed=3"),
        (("fit", "--stage", "align", "--data.batch_size", "3"), "without dashes: data.batch_size=VALUE"),
        (("fit", "--stage", "align", "trainer.max_steps"), "'trainer.max_steps' is not an override"),
        (("fit", "--stage", "align", "--preset", "minni"), "unknown preset 'minni'"),
        (("fit", "--stage", "align", "--preset", "smol"), "preset 'smol' has no configuration for stage"),
        (("fit", "--stage", "align", "--config", "no.yaml"), "cannot read configuration file no.yaml"),
        (("doctor", "x"), "unexpected word 'x'"),
        (("config",), "the following arguments are required: --stage"),
    ],
)
def test_other_mistakes(capsys, words, message):
    assert message in refused(capsys, *words)


def test_no_command_prints_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0
    assert "COMMAND" in capsys.readouterr().out


def test_overrides_may_stand_anywhere(align_is_toy, capsys):
    words = (align_is_toy[0], "toy.width=5", *align_is_toy[1:], "--dry-run", "toy.name=yes")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "width: 5" in out
    assert "name: 'yes'" in out


def test_config_file_replaces_the_preset(align_is_toy, capsys):
    assert main([*align_is_toy, "--dry-run"]) == 0
    assert "width: 4" in capsys.readouterr().out


def test_config_lists_every_key(capsys):
    assert main(["config", "--stage", "align"]) == 0
    out = capsys.readouterr().out
    assert "trainer.max_steps = " in out
    assert "Optimizer steps in all" in out
    assert "one of 32-true, bf16-true, bf16-mixed, 16-mixed, auto" in out


def test_our_own_mistake_is_one_line_too(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(fit_command, "load_config", broken)
    monkeypatch.delenv("PREFGEN_DEBUG", raising=False)
    assert main(["fit", "--stage", "align"]) == 1
    assert (
        capsys.readouterr().err == "prefgen: error: RuntimeError: two lines (PREFGEN_DEBUG=1 shows where)\n"
    )


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m prefgen config --stage align | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert configs_folder().is_dir()
