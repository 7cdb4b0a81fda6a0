"""Killed anywhere, an import goes on and ends with the same bytes; run again, it changes nothing."""

import os
import signal
import subprocess
import sys

import pytest

from prefgen.data.sources import importing
from prefgen.data.sources.spool import Spool
from prefgen.errors import DataError

NAMES = ["folder", "table", "pipbench", "prefbench", "pickapic", "learn-user-pref"]


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr(importing, "COMMIT_IMAGES", 5)


@pytest.mark.parametrize(
    "name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
)
def test_killed_after_every_commit(tmp_path, make, tools, monkeypatch, name):
    """Each run lives for one commit and does the work of the next, whose images then lie about."""
    if name == "prefbench":
        monkeypatch.setattr(importing, "COMMIT_IMAGES", 15)  # it has many images
    source = make(name)
    tools.run(name, source, tmp_path / "whole")
    commit, left = Spool.commit, [0]

    def commit_once(spool):
        if left[0] == 0:
            raise tools.Crash
        left[0] -= 1
        commit(spool)

    kills = 0
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "commit", commit_once)
        while True:
            left[0] = 1
            try:
                tools.run(name, source, tmp_path / "killed")
                break
            except tools.Crash:
                kills += 1
                assert not (tmp_path / "killed" / "history.jsonl").exists()
    assert kills > 8
    assert tools.bytes_of(tmp_path / "killed") == tools.bytes_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["history.jsonl", "card.md", "card.png", "import.json"])
def test_killed_while_files_are_put_in_place(tmp_path, make, tools, monkeypatch, target):
    source = make("table")
    tools.run("table", source, tmp_path / "whole")
    replace = os.replace

    def replace_until(old, new):
        if os.path.basename(new) == target:
            raise tools.Crash
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until)
        with pytest.raises(tools.Crash):
            tools.run("table", source, tmp_path / "killed")
    assert not (tmp_path / "killed" / "import.json").exists()
    assert not tools.run("table", source, tmp_path / "killed").was_finished
    assert tools.bytes_of(tmp_path / "killed") == tools.bytes_of(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
from prefgen.data.sources import importing
from prefgen.data.sources.catalogue import open_source
importing.COMMIT_IMAGES = 5
seen = []
def kill(stage, **_):
    seen.append(stage)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
plan = importing.ImportPlan(min_judgements=1, num_workers=2, licence="CC0")
opened = open_source("prefbench", path=Path(sys.argv[1]))
importing.run_import(opened, out=Path(sys.argv[2]), plan=plan, progress=kill)
"""


def test_kill_9(tmp_path, make, tools):
    source = make("prefbench")
    tools.run("prefbench", source, tmp_path / "whole")
    words = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "killed")]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / ".import").is_dir()
    tools.run("prefbench", source, tmp_path / "killed")
    assert tools.bytes_of(tmp_path / "killed") == tools.bytes_of(tmp_path / "whole")


def test_finished_is_finished(tmp_path, make, tools):
    source, out = make("table"), tmp_path / "out"
    assert not tools.run("table", source, out).was_finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = tools.run("table", source, out)
    assert again.was_finished
    assert again.report["kept"]["users"] == 3
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(DataError, match="finished import that differs in: near_distance"):
        tools.run("table", source, out, near_distance=2)
    source.write_text(source.read_text() + "u9,pics/1.png,yes,\n")
    with pytest.raises(DataError, match="finished import that differs in: sections"):
        tools.run("table", source, out)


def test_half_an_import_of_something_else(tmp_path, make, tools, monkeypatch):
    def crash(spool):
        raise tools.Crash

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "settle", crash)
        with pytest.raises(tools.Crash):
            tools.run("table", make("table"), tmp_path / "out")
    with pytest.raises(DataError, match="half an import that differs in: importer, sections"):
        tools.run("folder", make("folder"), tmp_path / "out")


def test_a_source_that_changed_while_killed(tmp_path, make, tools, monkeypatch):
    def crash(spool):
        raise tools.Crash

    source = make("table")
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "settle", crash)
        with pytest.raises(tools.Crash):
            tools.run("table", source, tmp_path / "out")
    source.write_text(source.read_text().replace("yes", "no "))
    with pytest.raises(DataError, match=r"judged\.csv has changed since"):
        tools.run("table", source, tmp_path / "out")


def test_a_full_disk_is_a_users_mistake_and_loses_nothing(tmp_path, make, tools, monkeypatch):
    source = make("table")
    tools.run("table", source, tmp_path / "whole")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(importing, "write_picture", full)
        with pytest.raises(DataError, match="stopped: .*No space left on device; mend it and repeat"):
            tools.run("table", source, tmp_path / "out")
    tools.run("table", source, tmp_path / "out")
    assert tools.bytes_of(tmp_path / "out") == tools.bytes_of(tmp_path / "whole")


def test_two_imports_into_one_folder(tmp_path, make, tools):
    out = tmp_path / "out"
    (out / ".import").mkdir(parents=True)
    held = Spool(out / ".import" / "spool.sqlite", fractions=(1, 0, 0))
    with pytest.raises(DataError, match="in use by another import"):
        tools.run("table", make("table"), out)
    held.close()


def test_a_history_that_is_there_already(tmp_path, make, tools):
    source = make("table")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "history.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="holds a history.jsonl already"):
        tools.run("table", source, tmp_path / "out")
    (tmp_path / "out" / "import.json").write_text("[]")
    with pytest.raises(DataError, match="no report of an import"):
        tools.run("table", source, tmp_path / "out")


def test_groups_hold_a_bounded_number_of_bytes(make, monkeypatch):
    from prefgen.data.sources.base import Batch, Judgement

    monkeypatch.setattr(importing, "COMMIT_IMAGES", 1000)
    monkeypatch.setattr(importing, "COMMIT_BYTES", 100)
    batches = (
        Batch(position=i, done=i, judgements=(Judgement(user_id="u", verdict="liked", image=b"x" * 40),))
        for i in range(10)
    )
    assert [len(group) for group in importing._groups(batches)] == [3, 3, 3, 1]
