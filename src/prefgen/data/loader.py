"""A loader that resumes exactly: its state is one position, and going on seeks there instead of replaying.

torch's DataLoader does the work in processes; this class decides the order and counts what the consumer got.
Lightning 2.6.6 calls ``state_dict``/``load_state_dict`` by itself. Two of its habits bind here. It knows an
epoch's last batch without fetching one more only where there is a ``__len__``. And after a resume its own
epochs cannot be trusted: a fit that ended at ``max_steps`` in mid-epoch counts as a whole epoch, one that
ended at an epoch's end goes on with an epoch of a single batch. So a training loader is one endless stream,
cut into epochs by itself alone: it has no ``sampler`` for Lightning to call ``set_epoch`` on, and a new
iterator goes on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader

from prefgen.data.budget import TokenBudget
from prefgen.data.epoch_batches import EpochBatches
from prefgen.data.loader_checks import checked_position, worker_trouble
from prefgen.data.reader import OnBad, SkipCounter
from prefgen.data.workers import (
    BatchPlan,
    Collate,
    ExampleDataset,
    Examples,
    Packet,
    StallWatch,
    start_worker,
    stop_workers,
)
from prefgen.errors import DataError

T = TypeVar("T")
B = TypeVar("B")

STATE_VERSION = 1


class ResumableLoader(Generic[T, B]):
    """Batches of one rank, epoch after epoch, from any position.

    Attributes:
        epoch: the epoch of the next batch.
        batches_done: batches of that epoch handed to the consumer.
        skipped: bad samples left out so far (``on_bad="skip"``), over all workers.
    """

    def __init__(
        self,
        dataset: ExampleDataset[T],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        num_workers: int,
        collate_fn: Callable[[list[T]], B],
        rank: int = 0,
        world_size: int = 1,
        window_shards: int | None = None,
        limit_batches: int | None = None,
        on_bad: OnBad = "raise",
        prefetch_factor: int = 2,
        stall_seconds: int = 0,
        multiprocessing_context: str | None = None,
        budget: TokenBudget | None = None,
        name: str = "samples",
    ) -> None:
        """Check the sizes and build; no process starts before the first batch.

        Args:
            dataset: see :class:`ExampleDataset`. Picklable, like ``collate_fn``.
            batch_size: samples a batch on this rank.
            seed: of the order.
            shuffle: training. Without it (evaluation) the order is the data set's, the epoch stays 0, so that
                the same questions are asked each time, and each sample is met exactly once over the ranks.
            drop_last: leave out an incomplete last batch.
            num_workers: processes; 0 works in this one. Never changes what comes.
            collate_fn: list of examples -> batch; a module-level function or object.
            rank: this process among ``world_size``. In training the ranks' batches lie side by side in the
                order: W ranks with batches of B see the global batches of one process with batches of W x B.
                With ``window_shards`` every rank reads a part of its own instead.
            world_size: number of processes that share the data.
            window_shards: shuffle inside windows of so many shards; the data set must have ``shard_sizes``.
            limit_batches: end every epoch after so many batches.
            on_bad: let a sample's DataError pass, or leave the sample out, count and log it (smaller batch).
            prefetch_factor: batches every worker prepares ahead.
            stall_seconds: how long a batch may take. Then workers count as stuck, a DataError; without
                workers a warning says what is waited for. 0 waits for ever.
            multiprocessing_context: "fork", "forkserver" or "spawn"; default torch's own.
            budget: cut epochs into batches by tokens; ``batch_size`` is then the most samples of a batch, and
                epochs may differ in their number of batches, which all ranks share.
            name: what the samples are called in messages, such as "users of split train".

        Raises:
            DataError: sizes that make no batch; the message shows the arithmetic.
        """
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.epoch = 0
        self.batches_done = 0
        self._shuffle = shuffle
        self._batches = EpochBatches(
            dataset,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            window_shards=window_shards,
            limit_batches=limit_batches,
            budget=budget,
        )
        self._batches.check(name=name, num_workers=num_workers)
        self._skips = SkipCounter()
        self._moves = 0
        self._stall_seconds = stall_seconds
        self._watch = StallWatch(seconds=0 if num_workers else stall_seconds)
        self._plan = BatchPlan()
        self._loader: DataLoader[Any] = DataLoader(
            Examples(dataset, on_bad=on_bad),
            batch_sampler=self._plan,
            num_workers=num_workers,
            collate_fn=Collate(collate_fn),
            worker_init_fn=start_worker if num_workers else None,
            multiprocessing_context=multiprocessing_context if num_workers else None,
            prefetch_factor=prefetch_factor if num_workers else None,
            persistent_workers=num_workers > 0,
            timeout=stall_seconds if num_workers else 0,
            # torch draws a base seed for each pass; from the global generator, dropout would depend on how
            # often the loader was started, and a resumed run would differ.
            generator=torch.Generator().manual_seed(seed),
        )
        self._stop = weakref.finalize(self, stop_workers, self._loader)

    def __len__(self) -> int:
        """Batches of one epoch on this rank: of the current one, where a budget lets them differ."""
        return self._batches.count(epoch=self.epoch)

    def __iter__(self) -> Iterator[B]:
        """Training goes on where the consumer stopped, to the end of that epoch; evaluation begins anew.

        After an epoch's last batch the next epoch begins. Iterators of one loader share its position.
        """
        if not self._shuffle:
            self._move(epoch=self.epoch, batches_done=0)
        elif self.batches_done >= len(self):
            self._move(epoch=self.epoch + 1, batches_done=0)
        return _Batches(self)

    @property
    def skipped(self) -> int:
        """Bad samples left out so far."""
        return self._skips.count

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; nothing happens when the loader is in it already."""
        if epoch != self.epoch:
            self._move(epoch=epoch, batches_done=0)

    def state_dict(self) -> dict[str, int | str]:
        """Where the consumer is: plain values only."""
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            **self._batches.identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Seek. The state may come from any rank and any number of workers.

        It may also come from another number of ranks, if ranks x batch size is the same and the order is not
        in windows: the global batches are then the same ones.

        Raises:
            CheckpointError: the state is of another order: other data, seed, or samples a step.
        """
        epoch, done = checked_position(
            state,
            expected={"version": STATE_VERSION, **self._batches.identity()},
            length=self._batches.count,
            any_split=self._batches.by_turns,
        )
        self._move(epoch=epoch, batches_done=done)

    def close(self) -> None:
        """Stop the worker processes; iterating again starts new ones."""
        stop_workers(self._loader)
        self._moves += 1

    def _move(self, *, epoch: int, batches_done: int) -> None:
        self.epoch = epoch
        self.batches_done = batches_done
        self._moves += 1

    def _start(self) -> Iterator[Packet[B]]:
        """Iterator over the rest of the current epoch, from the current position."""
        self._plan.epoch = self.epoch
        self._plan.batches = self._batches.of(self.epoch, start=self.batches_done)
        return iter(self._loader)

    def _next(self, source: Iterator[Packet[B]]) -> Packet[B]:
        """The next packet; what keeps it from coming is said in words.

        Raises:
            DataError: the workers are stuck or dead.
        """
        self._watch.begin(f"epoch {self.epoch}, batch {self.batches_done}")
        try:
            return next(source)
        except RuntimeError as error:
            trouble = worker_trouble(
                error,
                where=f"epoch {self.epoch}, batch {self.batches_done}",
                samples=self._due(),
                num_workers=self.num_workers,
                seconds=self._stall_seconds,
            )
            if trouble is None:
                raise
            raise trouble from None
        finally:
            self._watch.end()

    def _due(self) -> Sequence[int]:
        """Positions of the samples of the batch that is waited for."""
        left = len(self) - self.batches_done
        return self._plan.batches[-left] if 0 < left <= len(self._plan.batches) else ()

    def _hand_over(self, packet: Packet[B]) -> B:
        if packet.failure is not None:
            raise DataError(packet.failure)
        for reason in packet.skipped:
            self._skips.add(DataError(reason))
        if packet.batch is None:
            raise DataError(f"every sample of a batch was bad; the last: {packet.skipped[-1]}")
        self.batches_done += 1
        return packet.batch


class _Batches(Generic[T, B]):
    """Iterator over the loader's current epoch. Starts when the first batch is asked for.

    The position is read at the first ``next``, and again whenever the loader was moved: Lightning creates
    iterators that it then does not use.
    """

    def __init__(self, loader: ResumableLoader[T, B]) -> None:
        self._owner = loader
        self._moves = -1
        self._source: Iterator[Packet[B]] = iter(())

    def __iter__(self) -> _Batches[T, B]:
        return self

    def __len__(self) -> int:
        return len(self._owner)

    def __next__(self) -> B:
        owner = self._owner
        if owner.batches_done >= len(owner):
            raise StopIteration
        if self._moves != owner._moves:
            self._source = owner._start()
            self._moves = owner._moves
        return owner._hand_over(owner._next(self._source))
