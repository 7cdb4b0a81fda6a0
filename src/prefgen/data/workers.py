"""What happens on the far side of a loader: reading examples, in this process or in workers."""

from __future__ import annotations

import logging
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from prefgen.data.reader import OnBad
from prefgen.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
B = TypeVar("B")

WORKER_GRACE_SECONDS = 30
"""How long a worker outlives SIGTERM, so that the trainer can finish its step and write a checkpoint."""


class ExampleDataset(Protocol[T_co]):
    """What the loader reads. ``example`` is a pure function of its arguments: randomness through ``rng_for``.

    A data set read in windows also has ``shard_sizes``: samples in each shard, in order.
    """

    def __len__(self) -> int:
        """Number of samples."""

    def example(self, index: int, *, epoch: int) -> T_co | None:
        """One example; ``None`` for a sample the reader has skipped (and counted)."""


class GroupedDataset(Protocol):
    """A data set whose samples may share a batch only within a group, such as pictures of one shape.

    Attributes:
        num_groups: above 1; a data set without the attribute is of one group.
    """

    num_groups: int

    def groups(self, *, epoch: int) -> NDArray[np.int64]:
        """(num_samples,) group of each sample in this epoch: a pure function of the epoch."""


class BatchPlan(Sampler[list[tuple[int, int]]]):
    """The batches to prepare next, as (position, epoch) pairs: workers need no state of their own."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            yield [(position, self.epoch) for position in batch]


@dataclass(frozen=True)
class BadExample:
    """Stands for an example that could not be made."""

    reason: str
    skip: bool


@dataclass(frozen=True)
class Packet(Generic[B]):
    """What travels from a worker: a batch, what was left out of it, and the error to raise, as text.

    An exception itself would arrive with the worker's whole traceback inside its message.
    """

    batch: B | None
    skipped: tuple[str, ...] = ()
    failure: str | None = None


class Examples(Dataset[object]):
    """Adapts ``example(index, epoch=)`` to torch's ``[]`` and turns bad samples into marks."""

    def __init__(self, dataset: ExampleDataset[Any], *, on_bad: OnBad) -> None:
        self._dataset = dataset
        self._on_bad = on_bad

    def __getitem__(self, where: tuple[int, int]) -> object:
        index, epoch = where
        try:
            example = self._dataset.example(index, epoch=epoch)
        except DataError as error:
            return BadExample(str(error), skip=self._on_bad == "skip")
        return BadExample(f"sample {index}, by its reader", skip=True) if example is None else example


class Collate(Generic[T, B]):
    """Collates the good examples and carries the reasons of bad ones to the main process."""

    def __init__(self, collate_fn: Callable[[list[T]], B]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, examples: list[Any]) -> Packet[B]:
        """Collate what is good; say what was left out, or why the batch failed."""
        bad = [example for example in examples if isinstance(example, BadExample)]
        failure = next((mark.reason for mark in bad if not mark.skip), None)
        if failure is not None:
            return Packet(None, failure=failure)
        good = [example for example in examples if not isinstance(example, BadExample)]
        try:
            batch = self._collate_fn(good) if good else None
        except DataError as error:
            return Packet(None, failure=str(error))
        return Packet(batch, skipped=tuple(mark.reason for mark in bad))


def start_worker(worker: int) -> None:
    """One thread; and no dying at the signals that are meant for the trainer.

    Slurm and Ctrl-C signal the whole group: workers that die first turn a clean stop into a crash.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _postpone)


def _postpone(signum: int, frame: object) -> None:
    signal.alarm(WORKER_GRACE_SECONDS)


def stop_workers(loader: DataLoader[Any]) -> None:
    """Stop the processes of a DataLoader; iterating it again starts new ones."""
    iterator = loader._iterator
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
    loader._iterator = None


class StallWatch:
    """Says so when a batch does not come, from a thread of its own: ``with watch.waiting("..")``.

    One thread for the loader's life, since one for each batch would cost more than many a batch.
    """

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._what = ""
        self._since: float | None = None
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_seconds": self._seconds, "_what": "", "_since": None, "_thread": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    def begin(self, what: str) -> None:
        """Waiting begins; ``what`` is waited for."""
        if self._seconds <= 0:
            return
        self._what, self._since = what, time.monotonic()
        if self._thread is None:
            watch = weakref.ref(self)
            self._thread = threading.Thread(target=_watch, args=(watch, self._seconds), daemon=True)
            self._thread.start()

    def end(self) -> None:
        """It came."""
        self._since = None

    def look(self, *, said: float | None) -> float | None:
        """Warn once about a wait that is too long; returns the start of the wait that was warned of."""
        since = self._since
        if since is None or since == said or time.monotonic() - since < self._seconds:
            return said if since == said else None
        logger.warning(
            "no batch for %.0f s (%s): the disk or network behind the data is slow or gone; still waiting",
            self._seconds,
            self._what,
        )
        return since


def _watch(watch: weakref.ref[StallWatch], seconds: float) -> None:
    said: float | None = None
    while (alive := watch()) is not None:
        said = alive.look(said=said)
        del alive
        time.sleep(min(1.0, seconds / 4))
