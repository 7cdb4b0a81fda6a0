"""Which samples make which batch of an epoch on one rank: a pure function of seed, epoch and sizes."""

from __future__ import annotations

from collections.abc import Sized
from typing import cast

import numpy as np
from numpy.typing import NDArray

from prefgen.data.budget import TokenBudget
from prefgen.data.loader_checks import check_share, check_sizes, check_windows
from prefgen.data.order import (
    epoch_order,
    fingerprint,
    full_batches,
    group_batches,
    rank_positions,
    rank_share,
)
from prefgen.data.workers import GroupedDataset
from prefgen.errors import DataError


class EpochBatches:
    """Batches of one rank.

    Args:
        dataset: its length, and where it has them its ``shard_sizes`` and ``num_groups``.
        batch_size: samples a batch on this rank.
        seed: of the order.
        shuffle: training.
        drop_last: leave out an incomplete last batch.
        rank: this process among ``world_size``.
        world_size: number of processes that share the data.
        window_shards: shuffle inside windows of so many shards.
        limit_batches: end every epoch after so many batches.
        budget: cut epochs by tokens.

    The arguments mean what they mean to :class:`prefgen.data.loader.ResumableLoader`.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        rank: int,
        world_size: int,
        window_shards: int | None,
        limit_batches: int | None,
        budget: TokenBudget | None = None,
    ) -> None:
        self._dataset = dataset
        self._size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._rank = rank
        self._world_size = world_size
        self._window_shards = window_shards
        self._limit = limit_batches
        self._num_groups = int(getattr(dataset, "num_groups", 1))
        self._budget = budget
        self._kept: tuple[int, list[list[int]]] | None = None

    @property
    def by_turns(self) -> bool:
        """Whether the ranks' batches lie side by side in the order."""
        whole = self._num_groups == 1 and self._budget is None
        return self._equal and self._window_shards is None and whole

    @property
    def _equal(self) -> bool:
        return self._shuffle or self._drop_last

    @property
    def _shard_sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self._dataset, "shard_sizes", ()))

    def check(self, *, name: str, num_workers: int) -> None:
        """Refuse what makes no batch.

        Args:
            name: what the samples are called.
            num_workers: loader processes.

        Raises:
            DataError: the message shows the arithmetic.
        """
        check_sizes(
            {
                "batch_size": self._size,
                "world_size": self._world_size,
                "window_shards": self._window_shards,
                "limit_batches": self._limit,
            }
        )
        have = len(self._dataset)
        check_share(
            have,
            name=name,
            rank=self._rank,
            world_size=self._world_size,
            num_workers=num_workers,
            per_rank=self._size if self._drop_last else 1,
        )
        if self._num_groups > 1 and not self.count(epoch=0):
            raise DataError(
                f"{have // self._world_size} {name} a rank in {self._num_groups} groups fill no batch of "
                f"{self._size} for certain; lower the batch size or the number of groups"
            )
        if self._window_shards is not None:
            check_windows(have, shard_sizes=self._shard_sizes)

    def identity(self) -> dict[str, int | str]:
        """What a saved position depends on: plain values."""
        return {
            "seed": self._seed,
            "batch_size": self._size,
            "world_size": self._world_size,
            "num_samples": len(self._dataset),
            "order": fingerprint(
                self._shuffle,
                self._drop_last,
                self._window_shards,
                self._limit,
                self._shard_sizes if self._window_shards else (),
                *((self._num_groups,) if self._num_groups > 1 else ()),
                *(() if self._budget is None else (self._budget.max_tokens,)),
            ),
        }

    def count(self, *, epoch: int) -> int:
        """Batches of an epoch: the same in all, except under a budget."""
        if self._budget is None and (self._num_groups == 1 or self._drop_last):
            batches = self._even_count()
        else:
            batches = len(self._uneven(epoch=epoch))
        return batches if self._limit is None else min(batches, self._limit)

    def _even_count(self) -> int:
        if self._num_groups > 1:  # those that fill for certain, so that all epochs have as many
            return full_batches(self._share_size(), num_groups=self._num_groups, batch_size=self._size)
        full, rest = divmod(self._share_size(), self._size)
        return full if self._drop_last else full + bool(rest)

    def of(self, epoch: int, *, start: int) -> list[list[int]]:
        """Positions of the samples of each batch of an epoch, from batch ``start`` on."""
        end = self.count(epoch=epoch)
        if self._budget is not None or self._num_groups > 1:
            return self._uneven(epoch=epoch)[start:end]
        mine = self._order(epoch=epoch)[start * self._size : end * self._size].tolist()
        return [mine[i : i + self._size] for i in range(0, len(mine), self._size)]

    def _uneven(self, *, epoch: int) -> list[list[int]]:
        """All batches of an epoch where their number cannot be told without cutting; the last one is kept."""
        if self._kept is None or self._kept[0] != epoch:
            self._kept = (epoch, self._by_groups(epoch) if self._budget is None else self._by_tokens(epoch))
        return self._kept[1]

    def _by_groups(self, epoch: int) -> list[list[int]]:
        return group_batches(
            self._order(epoch=epoch),
            groups=cast(GroupedDataset, self._dataset).groups(epoch=epoch),
            batch_size=self._size,
            keep_rest=not self._drop_last,
        )

    def _by_tokens(self, epoch: int) -> list[list[int]]:
        assert self._budget is not None
        ranks = range(self._world_size)
        cut = [self._budget(self._order(epoch=epoch, rank=rank).tolist(), epoch=epoch) for rank in ranks]
        # ranks step together: what one has more than another waits for another epoch
        return cut[self._rank][: min(len(part) for part in cut)]

    def _share_size(self) -> int:
        share = rank_share(
            len(self._dataset), rank=self._rank, world_size=self._world_size, equal=self._equal
        )
        return len(range(share.start, share.stop))

    def _order(self, *, epoch: int, rank: int | None = None) -> NDArray[np.int64]:
        """Positions that a rank, by default this one, reads in an epoch."""
        order = epoch_order(
            len(self._dataset),
            seed=self._seed,
            epoch=epoch,
            shuffle=self._shuffle,
            shard_sizes=self._shard_sizes,
            window_shards=self._window_shards,
        )
        places = rank_positions(
            len(order),
            rank=self._rank if rank is None else rank,
            world_size=self._world_size,
            batch_size=self._size,
            equal=self._equal,
            by_turns=self.by_turns,
        )
        return order[places]
