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
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader

from prefgen.data.budget import TokenBudget
from prefgen.data.order import epoch_order, fingerprint, rank_share
from prefgen.data.reader import OnBad, SkipCounter
from prefgen.data.workers import (
    BatchPlan,
    Collate,
    ExampleDataset,
    Examples,
    Packet,
    start_worker,
    stop_workers,
)
from prefgen.errors import CheckpointError, DataError

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
            rank: this process among ``world_size``.
            world_size: number of processes that share the data.
            window_shards: shuffle inside windows of so many shards; the data set must have ``shard_sizes``.
            limit_batches: end every epoch after so many batches.
            on_bad: let a sample's DataError pass, or leave the sample out, count and log it (smaller batch).
            prefetch_factor: batches every worker prepares ahead.
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
        self._seed = seed
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._rank = rank
        self._world_size = world_size
        self._window_shards = window_shards
        self._limit_batches = limit_batches
        self._skips = SkipCounter()
        self._budget = budget
        self._cut: tuple[int, list[list[int]]] = (-1, [])
        self._moves = 0
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
            # torch draws a base seed for each pass; from the global generator, dropout would depend on how
            # often the loader was started, and a resumed run would differ.
            generator=torch.Generator().manual_seed(seed),
        )
        self._stop = weakref.finalize(self, stop_workers, self._loader)

    def __len__(self) -> int:
        """Batches of one epoch on this rank: of the current one, where a budget lets them differ."""
        if self._budget is not None:
            batches = len(self._batches())
            return batches if self._limit_batches is None else min(batches, self._limit_batches)
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
        """Seek. The state may come from any rank and from any number of workers.

        Raises:
            CheckpointError: the state is of another order: other data, seed, batch size or number of ranks.
        """
        for key, mine in {"version": STATE_VERSION, **self._identity()}.items():
            if state.get(key) != mine:
                raise CheckpointError(
                    f"the data position in the checkpoint was saved with {key}={state.get(key)!r}, but this "
                    f"run has {key}={mine!r}; exact resume needs the same {key}"
                )
        epoch, done = state.get("epoch"), state.get("batches_done")
        if isinstance(epoch, int) and isinstance(done, int) and epoch >= 0:
            self._move(epoch=epoch, batches_done=0)  # under a budget, its number of batches is its own
            if 0 <= done <= len(self):
                self._move(epoch=epoch, batches_done=done)
                return
        raise CheckpointError(
            f"the data position in the checkpoint is damaged: epoch={epoch!r}, batch={done!r}"
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
                *(self._shuffle, self._drop_last, self._window_shards, self._limit_batches, sizes),
                *(() if self._budget is None else (self._budget.max_tokens,)),
            ),
        }

    def _move(self, *, epoch: int, batches_done: int) -> None:
        self.epoch = epoch
        self.batches_done = batches_done
        self._moves += 1

    def _share(self, rank: int) -> slice:
        return rank_share(len(self.dataset), rank=rank, world_size=self._world_size, equal=self._equal)

    def _share_size(self) -> int:
        share = self._share(self._rank)
        return len(range(share.start, share.stop))

    @property
    def _equal(self) -> bool:
        return self._shuffle or self._drop_last

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
        self._plan.epoch = self.epoch
        self._plan.batches = self._batches()[self.batches_done : len(self)]
        return iter(self._loader)

    def _batches(self) -> list[list[int]]:
        """All batches of the current epoch on this rank."""
        if self._cut[0] == self.epoch:
            return self._cut[1]
        order = epoch_order(
            len(self.dataset),
            seed=self._seed,
            epoch=self.epoch,
            shuffle=self._shuffle,
            shard_sizes=getattr(self.dataset, "shard_sizes", ()),
            window_shards=self._window_shards,
        )
        if self._budget is None:
            mine = order[self._share(self._rank)].tolist()
            batches = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
        else:
            # ranks step together: what one has more than another waits for another epoch
            cut = [
                self._budget(order[self._share(rank)].tolist(), epoch=self.epoch)
                for rank in range(self._world_size)
            ]
            batches = cut[self._rank][: min(len(part) for part in cut)]
        self._cut = (self.epoch, batches)
        return batches

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
        return owner._hand_over(next(self._source))
