"""In which order samples are seen: a pure function of (seed, epoch, rank, world size), never of workers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefgen.data.sampling import rng_for


def epoch_order(
    num_samples: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    shard_sizes: Sequence[int] = (),
    window_shards: int | None = None,
) -> NDArray[np.int64]:
    """Positions of all samples in the order of one epoch, before they are divided among ranks.

    Args:
        num_samples: size of the data set.
        seed: of the run.
        epoch: pass over the data, from 0.
        shuffle: without it the order is 0, 1, ..
        shard_sizes: samples in each shard, in order; sums to ``num_samples``.
        window_shards: shuffle the shards, then the samples inside windows of so many shards: reading stays
            within that many files at a time. ``None`` shuffles everything with everything.

    Returns:
        (num_samples,) int64.
    """
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    rng = rng_for(seed=seed, epoch=epoch, key="order", purpose="shuffle")
    if window_shards is None:
        return rng.permutation(num_samples)
    starts = np.concatenate([[0], np.cumsum(np.asarray(shard_sizes, dtype=np.int64))])
    shards = rng.permutation(len(shard_sizes))
    pieces = []
    for first in range(0, len(shards), window_shards):
        window = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window_shards]]
        pieces.append(rng.permutation(np.concatenate(window)))
    return np.concatenate(pieces).astype(np.int64, copy=False)


def rank_share(num_samples: int, *, rank: int, world_size: int, equal: bool) -> slice:
    """The contiguous part of an epoch's order that one rank reads: evaluation, and windows of shards.

    Args:
        num_samples: size of the data set.
        rank: 0 .. world_size - 1.
        world_size: number of ranks.
        equal: every rank gets ``num_samples // world_size`` (training: ranks must step together; the up to
            world_size - 1 samples left over differ from epoch to epoch with the shuffle). Otherwise every
            sample goes to exactly one rank and shares differ by at most one (evaluation).
    """
    if equal:
        size = num_samples // world_size
        return slice(rank * size, (rank + 1) * size)
    return slice(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)


def group_batches(
    order: Sequence[int] | NDArray[np.int64],
    *,
    groups: Sequence[int] | NDArray[np.int64],
    batch_size: int,
    keep_rest: bool,
) -> list[list[int]]:
    """Batches of one group each, in the order in which they fill.

    Args:
        order: positions, in the order of the epoch.
        groups: group of each position of the data set.
        batch_size: samples a batch.
        keep_rest: append what fills no batch, as smaller ones, in the order of the groups.
    """
    batches: list[list[int]] = []
    filling: dict[int, list[int]] = {}
    for position in order:
        group = int(groups[position])
        filling.setdefault(group, []).append(int(position))
        if len(filling[group]) == batch_size:
            batches.append(filling.pop(group))
    return batches + [filling[group] for group in sorted(filling)] if keep_rest else batches


def full_batches(num_samples: int, *, num_groups: int, batch_size: int) -> int:
    """Batches that :func:`group_batches` fills at least, however the samples fall into groups."""
    return max(0, -(-(num_samples - num_groups * (batch_size - 1)) // batch_size))


def rank_positions(
    num_samples: int, *, rank: int, world_size: int, batch_size: int, equal: bool, by_turns: bool
) -> NDArray[np.int64]:
    """Places in an epoch's order that one rank reads, batch after batch.

    Args:
        num_samples: size of the data set.
        rank: 0 .. world_size - 1.
        world_size: number of ranks.
        batch_size: samples a batch on each rank.
        equal: see :func:`rank_share`.
        by_turns: the ranks' batches lie side by side, so that W ranks with batches of B meet the same global
            batches as one process with batches of W x B. Otherwise every rank reads one contiguous part.

    Returns:
        int64 positions; of all ranks together each at most once.
    """
    if not by_turns:
        share = rank_share(num_samples, rank=rank, world_size=world_size, equal=equal)
        return np.arange(share.start, share.stop, dtype=np.int64)
    size = num_samples // world_size
    full, rest = divmod(size, batch_size)
    turns = (np.arange(full, dtype=np.int64)[:, None] * world_size + rank) * batch_size
    start = full * world_size * batch_size + rank * rest
    return np.concatenate([(turns + np.arange(batch_size)).ravel(), np.arange(start, start + rest)])


def fingerprint(*parts: object) -> str:
    """Short hash of whatever decides an order, for refusing to resume into another one."""
    return hashlib.sha256(repr(parts).encode("utf-8")).hexdigest()[:16]
