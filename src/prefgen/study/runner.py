"""Runs a plan step by step, each in a process of its own, and remembers what is done.

``steps.json`` of a run grows with every finished step: command, seconds, largest memory. Killed at any point,
the same command goes on: finished steps are passed over, and the step that was cut short begins again, which
for a fit means from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from prefgen.errors import ConfigError, DataError, StepFailedError
from prefgen.study.plan import Plan, Run
from prefgen.whole_file import write_json

logger = logging.getLogger(__name__)

STEPS_FILE = "steps.json"
_KIBI = 1024
_LAST_LINES = 400


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What running a plan came to.

    Attributes:
        done: folders of the runs that are finished.
        failed: folder -> the error, in one line.
    """

    done: tuple[str, ...]
    failed: dict[str, str]


def run_plan(plan: Plan, *, work: Path, only: Sequence[str] = ()) -> Outcome:
    """Run what is not done yet, in the plan's order; a run that fails does not stop the others.

    Args:
        plan: the study.
        work: its folder; runs go into ``work/runs``.
        only: names of runs; empty for all.

    Raises:
        ConfigError: ``only`` names a run that is not there.
        KeyboardInterrupt: a signal came; the step was told and has ended.
    """
    unknown = sorted(set(only) - {run.name for run in plan.runs})
    if unknown:
        names = ", ".join(dict.fromkeys(run.name for run in plan.runs))
        raise ConfigError(f"no run {unknown[0]!r} in {plan.path}; runs: {names}")
    chosen = [run for run in plan.runs if not only or run.name in only]
    done, failed = [], {}
    with locked(work) as lock:
        for number, run in enumerate(chosen, start=1):
            logger.info("study: run %s (%d of %d)", run.folder, number, len(chosen))
            try:
                run_one(plan, run, work=work, lock=lock)
                done.append(run.folder)
            except StepFailedError as error:
                logger.warning("study: %s", error)
                failed[run.folder] = str(error)
    return Outcome(done=tuple(done), failed=failed)


@contextmanager
def locked(work: Path) -> Iterator[int]:
    """The study's folder for this process and its steps alone.

    A step inherits the lock: where the study was killed and its step goes on, nobody trains beside it.

    Raises:
        ConfigError: somebody holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"a study, or a step of one that was killed, is running in {work}; wait for it or end it"
            ) from None
        yield file.fileno()


def run_one(plan: Plan, run: Run, *, work: Path, lock: int | None = None) -> None:
    """One run: its trial if it has one, then its steps.

    Args:
        plan: the study.
        run: which.
        work: the study's folder.
        lock: of that folder, handed on to every step.

    Raises:
        StepFailedError: a command failed.
    """
    book = StepBook(work / "runs" / run.folder, lock=lock)
    values: dict[str, str] = {}
    if run.trial is not None:
        for value in run.trial.values:
            for command in plan.trial_commands(run, work=work, value=value):
                book.do(command)
        values["best"] = _choose(plan, run, work=work, book=book)
    for command in plan.commands(run, work=work, values=values):
        book.do(command)
    book.close()


def _choose(plan: Plan, run: Run, *, work: Path, book: StepBook) -> str:
    """The value whose figure is best; what was found is kept for the report."""
    trial = run.trial
    assert trial is not None
    found = {}
    for value in trial.values:
        path = plan.place(trial.metrics, run=run, work=work, values={"value": value})
        found[value] = _figure(path, figure=trial.figure)
    best = min(found, key=found.__getitem__) if trial.best == "min" else max(found, key=found.__getitem__)
    book.note({"name": trial.name, "figure": trial.figure, "found": found, "best": best})
    return best


def _figure(path: Path, *, figure: str) -> float:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        for part in figure.split("|"):
            value = value[part]
        return float(value)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError):
        raise StepFailedError(
            f"no figure {figure} in {path}; name one that the trial's steps write"
        ) from None


class StepBook:
    """``steps.json`` of one run.

    Attributes:
        folder: the run's folder.
        steps: what has been done, in order.
    """

    def __init__(self, folder: Path, *, lock: int | None = None) -> None:
        self.folder, self._lock = folder, lock
        self._path = folder / STEPS_FILE
        record = read_book(folder)
        self._old: list[dict[str, Any]] = record.get("steps", [])
        self.steps: list[dict[str, Any]] = []
        self.trial: dict[str, Any] | None = record.get("trial")

    def do(self, command: Sequence[str]) -> None:
        """Run a command unless this very one was done here at this place, after the same ones.

        Raises:
            StepFailedError: it ended with an error.
        """
        place = len(self.steps)
        if place < len(self._old) and self._old[place]["command"] == list(command):
            self.steps.append(self._old[place])
            return
        self._old = []  # whatever was done after a step that is new has to be done again
        log = self.folder / f"step-{place:02d}.log"
        self.folder.mkdir(parents=True, exist_ok=True)
        logger.info("study: prefgen %s", shlex.join(command))
        began = time.monotonic()
        code, peak = run_command(command, log=log, lock=self._lock)
        if code:
            raise StepFailedError(
                f"'prefgen {shlex.join(command)}' ended with {code}: {_last_line(log)} ({log})"
            )
        self.steps.append(
            {
                "command": list(command),
                "seconds": round(time.monotonic() - began, 1),
                "peak_mb": round(peak / _KIBI, 1),
            }
        )
        self._write(finished=False)

    def note(self, trial: dict[str, Any]) -> None:
        """Keep what a trial found."""
        self.trial = trial
        self._write(finished=False)

    def close(self) -> None:
        """All steps are done."""
        self._write(finished=True)

    def _write(self, *, finished: bool) -> None:
        # Steps known from before and not yet reached are kept: a kill now must not forget them.
        steps = [*self.steps, *self._old[len(self.steps) :]]
        record = {"finished": finished, "steps": self.steps if finished else steps, "trial": self.trial}
        write_json(self._path, content=record)


def read_book(folder: Path) -> dict[str, Any]:
    """The content of a run's ``steps.json``; empty where there is none.

    Raises:
        DataError: it is torn.
    """
    path = folder / STEPS_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(record["steps"], list)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AssertionError):
        raise DataError(f"{path} is torn; delete it, and its run begins its steps again") from None
    return dict(record)


def run_command(command: Sequence[str], *, log: Path, lock: int | None = None) -> tuple[int, int]:
    """Run ``prefgen WORDS`` in a process of its own; its output goes into ``log``.

    Args:
        command: the words.
        log: file for all it prints.
        lock: open file that the process keeps open as long as it lives.

    Returns:
        exit code, and the largest memory of the process in KiB.
    """
    with log.open("wb") as file:
        words = [sys.executable, "-m", "prefgen", *command]
        # A session of its own: Ctrl-C would reach it twice, the second time while it writes its checkpoint.
        process = subprocess.Popen(
            words,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,
        )
        with _passed_on(process):
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM and SIGINT go to the command, which writes a checkpoint; then the study ends too."""
    caught: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        if not caught:
            process.send_signal(signal.SIGTERM)
        caught.append(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    told = [line for line in lines[-_LAST_LINES:] if line.startswith("prefgen: error: ")]
    shown = (told or [line for line in lines if line] or ["no output"])[-1]
    return shown.removeprefix("prefgen: error: ")[:300]
