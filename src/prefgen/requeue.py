"""Under Slurm: the warning signal before a job's end puts the job back into the queue.

``#SBATCH --signal=SIGUSR1@90`` sends the signal, :class:`prefgen.callbacks.RunCheckpoint` answers it with a
checkpoint at the next optimizer step, and the same command, started again by Slurm, goes on from there.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lightning.pytorch.plugins.environments import SLURMEnvironment

from prefgen.errors import StoppedBySignalError

logger = logging.getLogger(__name__)

REQUEUE_SIGNAL = signal.SIGUSR1
_JOB_ID = re.compile(r"\d+(_\d+)?")


def under_slurm() -> bool:
    """Whether this process is a task of a Slurm job."""
    return bool(SLURMEnvironment.detect())


def requeue() -> bool:
    """Ask Slurm to run this job again, once for all its tasks.

    Returns:
        Whether the job was put back.
    """
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return False
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not _JOB_ID.fullmatch(job):
        logger.warning("not requeued: %r is no Slurm job number", job)
        return False
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("not requeued: scontrol cannot be run (%s); submit job %s again", error, job)
        return False
    if done.returncode:
        logger.warning("not requeued: scontrol says %r; submit job %s again", done.stderr.strip(), job)
        return False
    logger.info("job %s is back in the queue", job)
    return True


@contextmanager
def stopping_before_training(run_dir: Path) -> Iterator[None]:
    """Answer the requeue signal while nothing has been trained yet, when stopping anywhere loses nothing."""
    if not under_slurm():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        raise StoppedBySignalError(
            f"stopped by {signal.Signals(number).name} before the first step",
            signal_number=number,
            checkpoint=run_dir / "checkpoints",
        )

    try:
        previous = signal.signal(REQUEUE_SIGNAL, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(REQUEUE_SIGNAL, previous)
