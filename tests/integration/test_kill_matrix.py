"""kill -9 at three moments of every stage, 0 and 2 workers: what goes on equals the run undisturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from prefgen.checkpoint import checkpoint_name, list_checkpoints
from prefgen.testing.resume import assert_same
from prefgen.testing.stages import STAGE_ARTEFACTS, tiny_settings
from prefgen.testing.study import save_tiny_workdir

STEPS, EVERY = 160, 8
KILLS = ("after a checkpoint", "while one is written", "after a checkpoint")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_tiny_workdir(tmp_path_factory.mktemp("killed"), num_users=48)


def command(stage, *, workdir, run_dir, num_workers):
    common = {
        "run_dir": run_dir,
        "trainer.max_steps": STEPS,
        "trainer.val_check_interval": STEPS,
        "trainer.num_threads": 1,
        "checkpoint.every_n_steps": EVERY,
        "loader.num_workers": num_workers,
    }
    words = [f"{key}={value}" for key, value in (tiny_settings(stage, workdir=workdir) | common).items()]
    return [sys.executable, "-m", "prefgen", "fit", "--stage", stage, *words]


def newest_step(folder):
    found = list_checkpoints(folder)
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def kill_at(process, *, folder, moment, after, pause):
    """Kill at the first checkpoint beyond step ``after``: as it is being written, or ``pause`` s later."""
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert process.poll() is None, f"it ended before the kill: {process.communicate()[1]}"
        names = os.listdir(folder) if folder.exists() else []
        beyond = newest_step(folder) > after
        if beyond and moment == "after a checkpoint":
            time.sleep(pause)
            break
        if beyond and any(name.endswith(".part") for name in names):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stage", list(STAGE_ARTEFACTS))
def test_three_kills_lose_nothing(stage, num_workers, workdir, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    runs = {name: tmp_path / name for name in ("straight", "killed")}
    commands = {
        name: command(stage, workdir=workdir, run_dir=run_dir, num_workers=num_workers)
        for name, run_dir in runs.items()
    }
    chance = random.Random(f"{stage} {num_workers}")
    folder = runs["killed"] / "checkpoints"
    for moment in KILLS:
        before = newest_step(folder)
        process = subprocess.Popen(commands["killed"], env=environment, stderr=subprocess.PIPE, text=True)
        kill_at(process, folder=folder, moment=moment, after=before + EVERY, pause=0.05 * chance.random())
        print(f"{stage}, {num_workers} workers: killed {moment}, newest is step {newest_step(folder)}")
        assert newest_step(folder) > before
    stopped_at = list_checkpoints(folder)[-1]
    said = {}
    for name in runs:
        done = subprocess.run(
            commands[name], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        said[name] = done.stderr
    assert f"going on from {stopped_at}" in said["killed"]
    assert "going on" not in said["straight"]
    straight, killed = (
        torch.load(run / "checkpoints" / checkpoint_name(STEPS), weights_only=True) for run in runs.values()
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(straight[part], killed[part], where=f"{stage} {part}")
    artefacts = [(run / STAGE_ARTEFACTS[stage]).read_bytes() for run in runs.values()]
    assert artefacts[0] == artefacts[1]
    assert not list(Path(folder).glob("*.part"))
