"""What a loader refuses before its first batch, and how it puts into words that its workers fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefgen.errors import CheckpointError, DataError

_SHOWN = 8
_SPLIT_KEYS = ("batch_size", "world_size")


def check_sizes(sizes: Mapping[str, int | None]) -> None:
    """Every size that is given is at least 1.

    Raises:
        DataError: one is not.
    """
    for key, value in sizes.items():
        if value is not None and value < 1:
            raise DataError(f"{key} must be at least 1, got {value}")


def check_share(
    num_samples: int, *, name: str, rank: int, world_size: int, num_workers: int, per_rank: int
) -> None:
    """Every rank gets its samples.

    Args:
        num_samples: size of the data set.
        name: what the samples are called.
        rank: 0 .. world_size - 1.
        world_size: number of ranks.
        num_workers: loader processes, at least 0.
        per_rank: samples each rank needs.

    Raises:
        DataError: with the arithmetic.
    """
    if num_workers < 0 or not 0 <= rank < world_size:
        raise DataError(
            f"need num_workers >= 0 and 0 <= rank < world_size, got num_workers={num_workers}, "
            f"rank={rank}, world_size={world_size}"
        )
    if num_samples < world_size * per_rank:
        fits = f" to {num_samples // world_size} or less" if num_samples >= world_size else ""
        raise DataError(
            f"{num_samples} {name} cannot give {world_size} rank(s) a batch of {per_rank} each "
            f"({world_size} x {per_rank} = {world_size * per_rank} needed); "
            f"lower the batch size{fits}, use fewer ranks, or build more data"
        )


def check_windows(num_samples: int, *, shard_sizes: Sequence[int]) -> None:
    """Shuffling in windows of shards needs to know them.

    Raises:
        DataError: the sizes do not sum to the data set's.
    """
    if sum(shard_sizes) != num_samples:
        raise DataError("window_shards needs a data set whose shard_sizes sum to its length")


def checked_position(
    state: Mapping[str, Any], *, expected: Mapping[str, Any], length: Callable[..., int], any_split: bool
) -> tuple[int, int]:
    """Epoch and batch of a saved position.

    Args:
        state: what a loader's ``state_dict`` gave.
        expected: version and identity of the loader that is to go on.
        length: ``length(epoch=)``, its batches in an epoch.
        any_split: whether the same samples a step may be split over another number of ranks.

    Raises:
        CheckpointError: the state is of another order: other data, seed, or samples a step; or damaged.
    """
    if any_split:
        _check_global_batch(state, expected=expected)
    for key, mine in expected.items():
        if state.get(key) != mine and not (any_split and key in _SPLIT_KEYS):
            raise CheckpointError(
                f"the data position in the checkpoint was saved with {key}={state.get(key)!r}, but this "
                f"run has {key}={mine!r}; exact resume needs the same {key}"
            )
    epoch, done = state.get("epoch"), state.get("batches_done")
    if isinstance(epoch, int) and isinstance(done, int) and epoch >= 0 and 0 <= done <= length(epoch=epoch):
        return epoch, done
    raise CheckpointError(f"the data position in the checkpoint is damaged: epoch={epoch!r}, batch={done!r}")


def _check_global_batch(state: Mapping[str, Any], *, expected: Mapping[str, Any]) -> None:
    own, ranks = (int(expected[key]) for key in _SPLIT_KEYS)
    parts = {key: state.get(key) for key in _SPLIT_KEYS}
    saved = [value for value in parts.values() if isinstance(value, int)]
    if len(saved) == 2 and saved[0] * saved[1] == own * ranks:
        return
    was = " and ".join(f"{key}={value!r}" for key, value in parts.items())
    raise CheckpointError(
        f"the data position in the checkpoint was saved with {was}, but this run has batch_size={own} and "
        f"world_size={ranks}; going on needs the same samples a step (batch size x ranks = "
        f"{own * ranks} here)"
    )


def worker_trouble(
    error: RuntimeError, *, where: str, samples: Sequence[int], num_workers: int, seconds: int
) -> DataError | None:
    """What torch says of its loader processes in words of ours; None where it is about something else.

    Args:
        error: what torch raised.
        where: epoch and batch that were waited for.
        samples: positions of that batch's samples.
        num_workers: loader processes.
        seconds: how long a batch may take.
    """
    text = " ".join(str(error).split())
    if "DataLoader timed out" in text:
        stuck = ", ".join(str(position) for position in samples[:_SHOWN])
        return DataError(
            f"no batch for {seconds} s: the {num_workers} loader process(es) are stuck at {where} (samples "
            f"number {stuck}); look at the disk or network behind the data, or raise loader.stall_seconds"
        )
    if "DataLoader worker" in text:
        return DataError(
            f"a loader process died ({text[:160]}), perhaps for memory; lower loader.num_workers or "
            "data.batch_size, then run the same command again"
        )
    return None
