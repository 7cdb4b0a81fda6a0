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

from prefgen.data.order import epoch_order, fingerprint, rank_positions, rank_share
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
from prefgen.errors import CheckpointError, DataError

T = TypeVar("T")
B = TypeVar("B")

STATE_VERSION = 1
_SPLIT_KEYS = ("batch_size", "world_size")


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
            name: what the samples are called in messages, such as "users of split train".

        Raises:
            DataError: sizes that make no batch; the message shows the arithmetic.
        """
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.epoch = 0
        self.batches_done = 0
        self._seed = seed
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._rank = rank
        self._world_size = world_size
        self._window_shards = window_shards
        self._limit_batches = limit_batches
        self._skips = SkipCounter()
        self._moves = 0
        self._stall_seconds = stall_seconds
        self._watch = StallWatch(seconds=0 if num_workers else stall_seconds)
        self._check(name)
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
        """Batches of one epoch on this rank."""
        full, rest = divmod(self._share_size(), self.batch_size)
        batches = full if self._drop_last else full + bool(rest)
        return batches if self._limit_batches is None else min(batches, self._limit_batches)

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
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Seek. The state may come from any rank and any number of workers.

        It may also come from another number of ranks, if ranks x batch size is the same and the order is not
        in windows: the global batches are then the same ones.

        Raises:
            CheckpointError: the state is of another order: other data, seed, or samples a step.
        """
        self._check_global_batch(state)
        for key, mine in {"version": STATE_VERSION, **self._identity()}.items():
            if state.get(key) != mine and not (key in _SPLIT_KEYS and self._by_turns):
                raise CheckpointError(
                    f"the data position in the checkpoint was saved with {key}={state.get(key)!r}, but this "
                    f"run has {key}={mine!r}; exact resume needs the same {key}"
                )
        epoch, done = state.get("epoch"), state.get("batches_done")
        if not isinstance(epoch, int) or not isinstance(done, int) or epoch < 0 or not 0 <= done <= len(self):
            raise CheckpointError(
                f"the data position in the checkpoint is damaged: epoch={epoch!r}, batch={done!r}"
            )
        self._move(epoch=epoch, batches_done=done)

    def _check_global_batch(self, state: dict[str, Any]) -> None:
        parts = {key: state.get(key) for key in _SPLIT_KEYS}
        saved = [value for value in parts.values() if isinstance(value, int)]
        if not self._by_turns or (len(saved) == 2 and saved[0] * saved[1] == self._global_batch):
            return
        was = " and ".join(f"{key}={value!r}" for key, value in parts.items())
        raise CheckpointError(
            f"the data position in the checkpoint was saved with {was}, but this run has "
            f"batch_size={self.batch_size} and world_size={self._world_size}; going on needs the same "
            f"samples a step (batch size x ranks = {self._global_batch} here)"
        )

    def close(self) -> None:
        """Stop the worker processes; iterating again starts new ones."""
        stop_workers(self._loader)
        self._moves += 1

    def _identity(self) -> dict[str, int | str]:
        sizes = tuple(getattr(self.dataset, "shard_sizes", ())) if self._window_shards else ()
        return {
            "seed": self._seed,
            "batch_size": self.batch_size,
            "world_size": self._world_size,
            "num_samples": len(self.dataset),
            "order": fingerprint(
                self._shuffle, self._drop_last, self._window_shards, self._limit_batches, sizes
            ),
        }

    def _move(self, *, epoch: int, batches_done: int) -> None:
        self.epoch = epoch
        self.batches_done = batches_done
        self._moves += 1

    def _share_size(self) -> int:
        share = rank_share(len(self.dataset), rank=self._rank, world_size=self._world_size, equal=self._equal)
        return len(range(share.start, share.stop))

    @property
    def _equal(self) -> bool:
        return self._shuffle or self._drop_last

    @property
    def _by_turns(self) -> bool:
        return self._equal and self._window_shards is None

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self._world_size

    def _check(self, name: str) -> None:
        sizes = {"batch_size": self.batch_size, "world_size": self._world_size}
        optional = {"window_shards": self._window_shards, "limit_batches": self._limit_batches}
        sizes |= {key: value for key, value in optional.items() if value is not None}
        for key, value in sizes.items():
            if value < 1:
                raise DataError(f"{key} must be at least 1, got {value}")
        if self.num_workers < 0 or not 0 <= self._rank < self._world_size:
            raise DataError(
                f"need num_workers >= 0 and 0 <= rank < world_size, got num_workers={self.num_workers}, "
                f"rank={self._rank}, world_size={self._world_size}"
            )
        have, ranks = len(self.dataset), self._world_size
        per_rank = self.batch_size if self._drop_last else 1
        if have < ranks * per_rank:
            raise DataError(
                f"{have} {name} cannot give {ranks} rank(s) a batch of {per_rank} each "
                f"({ranks} x {per_rank} = {ranks * per_rank} needed); "
                f"lower the batch size{f' to {have // ranks} or less' if have >= ranks else ''}, "
                "use fewer ranks, or build more data"
            )
        if self._window_shards is not None and sum(getattr(self.dataset, "shard_sizes", ())) != have:
            raise DataError("window_shards needs a data set whose shard_sizes sum to its length")

    def _start(self) -> Iterator[Packet[B]]:
        """Iterator over the rest of the current epoch, from the current position."""
        order = epoch_order(
            len(self.dataset),
            seed=self._seed,
            epoch=self.epoch,
            shuffle=self._shuffle,
            shard_sizes=getattr(self.dataset, "shard_sizes", ()),
            window_shards=self._window_shards,
        )
        places = rank_positions(
            len(order),
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self.batch_size,
            equal=self._equal,
            by_turns=self._by_turns,
        )
        self._plan.epoch = self.epoch
        first = self.batches_done * self.batch_size
        mine = order[places[first : len(self) * self.batch_size]].tolist()
        self._plan.batches = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
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
            text = " ".join(str(error).split())
            if "DataLoader timed out" in text:
                stuck = ", ".join(str(position) for position in self._due()[:8])
                raise DataError(
                    f"no batch for {self._stall_seconds} s: the {self.num_workers} loader process(es) are "
                    f"stuck at epoch {self.epoch}, batch {self.batches_done} (samples number {stuck}); "
                    "look at the disk or network behind the data, or raise loader.stall_seconds"
                ) from None
            if "DataLoader worker" in text:
                raise DataError(
                    f"a loader process died ({text[:160]}), perhaps for memory; lower loader.num_workers or "
                    "data.batch_size, then run the same command again"
                ) from None
            raise
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
