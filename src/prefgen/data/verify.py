"""What is in a folder of shards, and whether all of it is unharmed."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from prefgen.data.embeddings import EmbeddingReader
from prefgen.data.encoded import EncodedReader
from prefgen.data.images import MAX_PIXELS, decode_image
from prefgen.data.index import (
    ALL_SPLITS,
    Counts,
    Kind,
    ShardEntry,
    ShardIndex,
    group_users,
    local_path,
    read_index,
)
from prefgen.data.reader import ShardReader, UserSample
from prefgen.errors import DataError
from prefgen.schema import SIDES, Side, Split

MAX_PROBLEMS = 1000
"""Problems listed for one shard at most; the rest is counted."""

CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """One split.

    Attributes:
        counts: users, images and bytes.
        shards: number of tar files.
        samples: number of samples (users with very many images own several).
        liked_histogram: number of users by how many images they like.
        disliked_histogram: the same for disliked images.
    """

    counts: Counts
    shards: int
    samples: int
    liked_histogram: Mapping[int, int]
    disliked_histogram: Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What ``prefgen data inspect`` shows."""

    path: str
    kind: Kind
    schema_version: int
    splits: Mapping[Split, SplitSummary]
    header: Mapping[str, object]
    dropped: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What ``prefgen data verify`` found.

    Attributes:
        problems: one line each, in the order of the shards; empty when all is well.
        shards: tar files read.
        users: logical users read.
        images: images decoded.
        bytes: bytes hashed.
        seconds: time it took.
    """

    problems: tuple[str, ...]
    shards: int
    users: int
    images: int
    bytes: int
    seconds: float


class ShardProgress(Protocol):
    """What verification reports to."""

    def __call__(self, *, shards: int, bytes: int) -> None:
        """``shards`` and ``bytes`` finished so far."""


@dataclass(frozen=True, kw_only=True)
class _ShardResult:
    problems: tuple[str, ...] = ()
    users: int = 0
    images: int = 0
    bytes: int = 0


def inspect(path: Path | str) -> Summary:
    """Summarise a folder of shards from its index alone.

    Raises:
        DataError: no index, or a bad one.
    """
    index = read_index(path)
    return Summary(
        path=str(path),
        kind=index.kind,
        schema_version=index.schema_version,
        splits={split: _summarise(index, split=split) for split in ALL_SPLITS if index.splits.get(split)},
        header=index.header,
        dropped=index.dropped,
    )


def verify(
    path: Path | str, *, num_workers: int | None = None, progress: ShardProgress | None = None
) -> VerifyReport:
    """Read everything: checksums, offsets, every member, every image or array. Repairs nothing.

    Args:
        path: folder of history, embedding or encoded shards.
        num_workers: processes; default, and at most, one per core; 0 and 1 work in this one.
        progress: called after each shard.

    Raises:
        DataError: there is no readable index to verify against.
    """
    began = time.monotonic()
    root = local_path(path)
    root = root if root.is_dir() else root.parent
    index = read_index(root)
    jobs = [(split, number) for split in index.splits for number in range(len(index.splits[split]))]
    workers = min(os.cpu_count() or 1, len(jobs), num_workers if num_workers is not None else 1 << 30)
    results: dict[int, _ShardResult] = {}
    done_bytes = 0
    for job, result in _run(root, kind=index.kind, jobs=jobs, workers=workers):
        results[job] = result
        done_bytes += result.bytes
        if progress is not None:
            progress(shards=len(results), bytes=done_bytes)
    found = [results[job] for job in range(len(jobs))]
    problems = [line for result in found for line in result.problems]
    problems += _strangers(root, index=index)
    return VerifyReport(
        problems=tuple(problems),
        shards=len(found),
        users=sum(result.users for result in found),
        images=sum(result.images for result in found),
        bytes=done_bytes,
        seconds=time.monotonic() - began,
    )


def _summarise(index: ShardIndex, *, split: Split) -> SplitSummary:
    shards = index.splits[split]
    groups = [group for shard in shards for group in group_users(shard)]
    return SplitSummary(
        counts=index.counts(split),
        shards=len(shards),
        samples=sum(len(shard.samples) for shard in shards),
        liked_histogram=dict(sorted(Counter(sum(s.liked for s in group) for group in groups).items())),
        disliked_histogram=dict(sorted(Counter(sum(s.disliked for s in group) for group in groups).items())),
    )


def _run(
    root: Path, *, kind: Kind, jobs: list[tuple[Split, int]], workers: int
) -> Iterator[tuple[int, _ShardResult]]:
    if workers <= 1:
        for job, (split, number) in enumerate(jobs):
            yield job, _verify_shard(root, kind, split, number)
        return
    with ProcessPoolExecutor(workers) as pool:
        futures = {
            pool.submit(_verify_shard, root, kind, split, number): job
            for job, (split, number) in enumerate(jobs)
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise DataError(
                f"{root}: a verifying process was killed, perhaps for memory; use --workers 1"
            ) from None


@lru_cache(maxsize=4)
def _reader(root: Path, kind: Kind, split: Split) -> ShardReader | EmbeddingReader:
    """One reader per process: parsing a large index for every shard would dominate."""
    return ShardReader(root, split=split) if kind == "histories" else EmbeddingReader(root, split=split)


def _verify_shard(root: Path, kind: Kind, split: Split, number: int) -> _ShardResult:
    if kind == "encoded":
        return _verify_encoded(root, split, number)
    reader = _reader(root, kind, split)
    shard = reader.index.splits[split][number]
    path = root / shard.name
    try:
        problems, size = _verify_file(path, shard=shard)
    except OSError as error:
        return _ShardResult(problems=(f"{path}: cannot be read ({error.strerror})",))
    users = images = 0
    first = sum(reader.shard_sizes[:number])
    for position in range(first, first + reader.shard_sizes[number]):
        try:
            found = reader.read(position)
        except DataError as error:
            problems.append(str(error))
            continue
        users += 1
        if isinstance(found, UserSample):
            bad = list(_bad_images(found))
            images += len(found.liked) + len(found.disliked) - len(bad)
            problems += bad
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"{path}: and {len(problems) - MAX_PROBLEMS} more problems"]
    return _ShardResult(problems=tuple(problems), users=users, images=images, bytes=size)


def _verify_encoded(root: Path, split: Split, number: int) -> _ShardResult:
    reader = EncodedReader(root, split=split)
    shard = read_index(root).splits[split][number]
    path = root / shard.name
    try:
        problems, size = _verify_file(path, shard=shard)
    except OSError as error:
        return _ShardResult(problems=(f"{path}: cannot be read ({error.strerror})",))
    images = 0
    groups = list(group_users(shard))
    for group in groups:
        for position in range(len(group)):
            try:
                reader.image(group[0].user_id, position=position)
                images += 1
            except DataError as error:
                problems.append(str(error))
    del problems[MAX_PROBLEMS:]
    return _ShardResult(problems=tuple(problems), users=len(groups), images=images, bytes=size)


def _verify_file(path: Path, *, shard: ShardEntry) -> tuple[list[str], int]:
    """Checksum of the whole file, and nothing but samples and zeros in it."""
    problems: list[str] = []
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
        if digest.hexdigest() != shard.sha256:
            problems.append(f"{path}: checksum differs from the index: the file was damaged or replaced")
        ends = [sample.offset + sample.size for sample in shard.samples]
        for start, stop in zip([0, *ends], [*(sample.offset for sample in shard.samples), size], strict=True):
            file.seek(start)
            if any(file.read(max(0, stop - start))):
                problems.append(f"{path}: bytes {start} to {stop} belong to no sample of the index")
    return problems, size


def _bad_images(sample: UserSample) -> Iterator[str]:
    sides: tuple[Side, ...] = SIDES
    for side in sides:
        for position, data in enumerate(sample.side(side)):
            try:
                decode_image(data, where=sample.image_where(side, position=position), max_pixels=MAX_PIXELS)
            except DataError as error:
                yield str(error)


def _strangers(root: Path, *, index: ShardIndex) -> list[str]:
    """Tar files that no reader would ever open: what an interrupted or mixed build leaves."""
    known = {shard.name for shards in index.splits.values() for shard in shards}
    return [
        f"{path}: not in the index; left by another build?"
        for path in sorted(root.glob("*.tar"))
        if path.name not in known
    ]
