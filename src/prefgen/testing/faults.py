"""Injected faults on a tiny workdir: kills, torn and flipped files, full disks; what each leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from prefgen.checkpoint import checkpoint_name, list_checkpoints
from prefgen.config import load_config
from prefgen.errors import PrefgenError, StoppedBySignalError
from prefgen.precision import settle_precision
from prefgen.run import fit, load_class
from prefgen.run_noise import quiet_lightning, user_errors
from prefgen.stages import STAGES
from prefgen.testing.resume import assert_same
from prefgen.testing.stages import STAGE_ARTEFACTS, tiny_settings

Verdict = Literal["equal", "refused", "harmless", "unnoticed", "BAD"]
"""equal: the end is bit for bit the undisturbed run's (or file's). refused: one line, nothing used.
harmless: read as if nothing had happened, same content. unnoticed: other content was read without a word."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one fault came to.

    Attributes:
        kind: group of faults.
        fault: what was done.
        verdict: see :data:`Verdict`.
        words: the line the user gets, or what was compared.
    """

    kind: str
    fault: str
    verdict: Verdict
    words: str


def forkserver() -> Any:
    """A context whose processes come from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    modules = [path.partition(":")[0] for entry in STAGES.values() for path in (entry.module, entry.data)]
    context.set_forkserver_preload(["torch", "lightning.pytorch", "prefgen.run", *modules])
    return context


def stage_words(stage: str, *, workdir: Path, run_dir: Path, steps: int, every: int) -> list[str]:
    """``key=value`` words of a tiny run."""
    settings = tiny_settings(stage, workdir=workdir) | {
        "run_dir": str(run_dir),
        "trainer.max_steps": str(steps),
        "trainer.val_check_interval": str(steps),
        "trainer.num_threads": "1",
        "trainer.log_every_n_steps": "1",
        "checkpoint.every_n_steps": str(every),
    }
    return [f"{key}={value}" for key, value in settings.items()]


def train(stage: str, words: list[str]) -> None:
    """``prefgen fit`` without the command line, for processes of :func:`forkserver`."""
    torch.set_num_threads(1)
    config = settle_precision(load_config(stage, overrides=words))
    make_module, make_data = load_class(STAGES[stage].module), load_class(STAGES[stage].data)
    with quiet_lightning(), user_errors():
        try:
            fit(config, make_module=lambda: make_module(config), make_data=lambda: make_data(config))
        except StoppedBySignalError as error:
            raise SystemExit(128 + error.signal_number) from None


def run_in_process(function: Callable[..., None], *args: object, timeout: float = 600.0) -> int:
    """Exit code of a function in a forked process."""
    process = forkserver().Process(target=function, args=args)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return -999
    code: int = process.exitcode
    return code


def signal_in_process(
    function: Callable[..., None], *args: object, after: float, number: signal.Signals
) -> int:
    """The same, with a signal ``after`` seconds; returns the exit code, 0 when it was done before."""
    process = forkserver().Process(target=function, args=args)
    process.start()
    process.join(after)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join(600)
    code: int = process.exitcode
    return code


def compare_runs(straight: Path, disturbed: Path, *, stage: str, steps: int) -> str:
    """Empty when two finished runs are equal bit for bit, or what differs first."""
    one, other = (run / "checkpoints" / checkpoint_name(steps) for run in (straight, disturbed))
    if not other.is_file():
        return f"{other.name} is not there"
    contents = [torch.load(path, weights_only=True) for path in (one, other)]
    try:
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_same(contents[0][part], contents[1][part], where=part)
    except AssertionError as error:
        return str(error)
    artefacts = [(run / STAGE_ARTEFACTS[stage]).read_bytes() for run in (straight, disturbed)]
    if artefacts[0] != artefacts[1]:
        return "the artefacts differ"
    left = [path.name for path in disturbed.rglob("*") if path.name.endswith((".part", ".tmp"))]
    return f"half written: {left}" if left else ""


def kill_command(words: list[str], *, folder: Path, chance: random.Random, every: int, limit: float) -> int:
    """Start ``prefgen fit`` as a user does and kill -9 it at a random moment; returns the newest step left.

    The moment is drawn between the first new checkpoint and two more, or, one time in four, before any.
    """
    before = _newest(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "prefgen", "fit", *words], env=environment, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + limit
    wait_for = before if chance.random() < 0.25 else before + every
    while process.poll() is None and time.monotonic() < end and _newest(folder) < wait_for:
        time.sleep(0.005)
    time.sleep(chance.random() * (0.5 if wait_for > before else 8.0))
    process.kill()
    process.wait()
    return _newest(folder)


def _newest(folder: Path) -> int:
    found = list_checkpoints(folder)
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def spoil(path: Path, *, how: Literal["cut", "flip"], chance: random.Random) -> str:
    """Cut a file at a random place, or turn one random bit; returns what was done."""
    data = bytearray(path.read_bytes())
    size = len(data)
    place = chance.randrange(size)
    if how == "cut":
        del data[place:]
        path.write_bytes(data)
        return f"cut to {place:,} of {size:,} bytes"
    bit = chance.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place:,} turned"


def judge_file(
    path: Path, *, how: Literal["cut", "flip"], chance: random.Random, read: Callable[[], object], kind: str
) -> Outcome:
    """Spoil a file, read it by the code that a user's command runs, and put it back."""
    whole, before = path.read_bytes(), read()
    done = spoil(path, how=how, chance=chance)
    fault = f"{path.name}: {done}"
    try:
        now = read()
    except PrefgenError as error:
        return Outcome(kind=kind, fault=fault, verdict="refused", words=str(error))
    except Exception as error:  # the table's very question
        return Outcome(kind=kind, fault=fault, verdict="BAD", words=f"{type(error).__name__}: {error}")
    finally:
        path.write_bytes(whole)
    try:
        assert_same(before, now, where="content")
    except AssertionError as error:
        return Outcome(kind=kind, fault=fault, verdict="unnoticed", words=f"{error}")
    return Outcome(kind=kind, fault=fault, verdict="harmless", words="the same content is read")
