"""Histories and their image files -> WebDataset shards: one user a sample, no user in two splits."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from prefgen.data.index import ShardEntry, ShardIndex, local_path, parse_json, write_index
from prefgen.data.parts import PARTS_FOLDER, WHOLE, Part, write_part_index
from prefgen.data.reader import MAX_JSON_BYTES, OnBad
from prefgen.data.tarstore import prepare_folder, remove_shards
from prefgen.data.user_samples import BuildLimits, Packed, PackJob, pack
from prefgen.errors import DataError
from prefgen.schema import Split, UserHistory

DEFAULT_FRACTIONS = (0.9, 0.05, 0.05)
"""Share of train, validation and test among users whose history names no split."""


class Progress(Protocol):
    """What a builder reports to: one call per finished user."""

    def __call__(self, *, users: int, images: int) -> None:
        """``users`` and ``images`` finished so far."""


def count_histories(path: Path | str) -> int:
    """Lines of a history file that hold a user, without parsing them: for progress bars.

    Raises:
        DataError: missing file.
    """
    file = _history_file(path)
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def read_histories(path: Path | str) -> Iterator[UserHistory]:
    """Read ``history.jsonl`` line by line.

    Raises:
        DataError: missing file, a line over 16 MiB, bad json or a bad history; names file and line.
    """
    file = _history_file(path)
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_JSON_BYTES + 1):
            number += 1
            where = f"{file}:{number}"
            if len(line) > MAX_JSON_BYTES:
                raise DataError(f"{where}: line of over {MAX_JSON_BYTES:,} bytes")
            if line.strip():
                record = parse_json(line, where=where, max_bytes=MAX_JSON_BYTES)
                yield UserHistory.from_json(record, where=where)


def _history_file(path: Path | str) -> Path:
    file = local_path(path)
    if not file.is_file():
        raise DataError(f"no history file at {file}; pass --history FILE (one user a line, json)")
    return file


def assign_split(user_id: str, *, fractions: tuple[float, float, float] = DEFAULT_FRACTIONS) -> Split:
    """Split of a user whose history names none: a stable hash, so that adding users moves nobody.

    Args:
        user_id: the user.
        fractions: of train, validation and test; they sum to 1.

    Raises:
        DataError: the fractions are negative or do not sum to 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(f"split fractions must be three numbers >= 0 that sum to 1, got {fractions}")
    digest = hashlib.sha256(f"split|{user_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < fractions[0]:
        return "train"
    return "validation" if place < fractions[0] + fractions[1] else "test"


def write_shards(
    histories: Iterable[UserHistory],
    *,
    root: Path | str,
    out: Path | str,
    users_per_shard: int = 64,
    max_images_per_sample: int = 64,
    fractions: tuple[float, float, float] = DEFAULT_FRACTIONS,
    on_bad: OnBad = "raise",
    limits: BuildLimits | None = None,
    overwrite: bool = False,
    num_workers: int = 0,
    part: Part | None = None,
    progress: Progress | None = None,
) -> ShardIndex:
    """Build the shards of all splits in one pass and bounded memory.

    Webp, jpeg and png files keep their bytes; other formats become webp. Every image is decoded once, so that
    what the shards hold is known to be readable. The users of a tar file follow from the histories' order
    alone: any number of workers or parts writes the same bytes.

    Args:
        histories: users, in the order they shall have in the shards.
        root: folder the image paths are relative to; nothing outside it is read.
        out: folder for ``<split>-000000.tar`` .. and ``index.json``.
        users_per_shard: users in one tar file; fewer where some of them have no usable image.
        max_images_per_sample: a user with more images becomes several samples.
        fractions: see :func:`assign_split`.
        on_bad: raise at the first bad image, or leave it out and count it in the index's ``dropped``. A user
            left without images is dropped and counted too. Two users with one id are always an error.
        limits: sizes accepted; default :class:`BuildLimits`.
        overwrite: replace an earlier set in ``out``.
        num_workers: processes that read and decode; 0 works in this one.
        part: build only every ``part.count``-th tar file, for :func:`prefgen.data.parts.merge_parts`.
        progress: called after each user, or after each tar file of a worker.

    Raises:
        DataError: bad image or path (with ``on_bad="raise"``), two users with one id, no users at all.
    """
    limits = replace(limits or BuildLimits(), max_images_per_sample=max_images_per_sample)
    if max_images_per_sample < 2:
        raise DataError(f"max images per sample: expected at least 2, got {max_images_per_sample}")
    if users_per_shard < 1:
        raise DataError(f"users per shard: expected at least 1, got {users_per_shard}")
    out = Path(out)
    folder = out if part is None else out / PARTS_FOLDER
    if part is None:
        prepare_folder(out, overwrite=overwrite)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / part.index_name).unlink(missing_ok=True)
    plan = _Plan(fractions=fractions, users_per_shard=users_per_shard)
    mine = part or WHOLE
    jobs = (
        PackJob(path=folder / name, users=users, root=Path(root), limits=limits, on_bad=on_bad)
        for number, (name, users) in enumerate(plan.chunks(histories))
        if number % mine.count == mine.number
    )
    counted = _Counted(progress)
    try:
        packed = run_jobs(jobs, num_workers=num_workers, done=counted)
    except BaseException:
        if part is None:
            remove_shards(out)  # or the next try would find the folder occupied
        raise
    index = _index_of(packed)
    if part is not None:
        settings = (users_per_shard, fractions, on_bad, limits)
        write_part_index(index, out=out, part=part, plan=plan.fingerprint(settings))
        return index
    if not index.splits:
        raise DataError(f"no users with images to build shards from ({plan.num_users} histories read)")
    write_index(index, out=out)
    return index


class _Plan:
    """Which users go into which tar file: a pure function of the histories' order."""

    def __init__(self, *, fractions: tuple[float, float, float], users_per_shard: int) -> None:
        self._fractions, self._limit = fractions, users_per_shard
        self._seen: set[str] = set()
        self._digest = hashlib.sha256()

    @property
    def num_users(self) -> int:
        """Histories read so far."""
        return len(self._seen)

    def fingerprint(self, settings: object) -> str:
        """Of the histories read and of settings."""
        return hashlib.sha256(f"{self._digest.hexdigest()} {settings!r}".encode()).hexdigest()

    def chunks(self, histories: Iterable[UserHistory]) -> Iterator[tuple[str, tuple[UserHistory, ...]]]:
        """File name and users of each tar file."""
        waiting: dict[Split, list[UserHistory]] = {}
        numbers: Counter[Split] = Counter()
        for history in histories:
            if history.user_id in self._seen:
                raise DataError(
                    f"two users with the id {history.user_id!r}; ids must be unique over all splits"
                )
            self._seen.add(history.user_id)
            split = history.split or assign_split(history.user_id, fractions=self._fractions)
            self._digest.update(repr(replace(history, split=split)).encode())
            mine = waiting.setdefault(split, [])
            mine.append(replace(history, split=split))
            if len(mine) == self._limit:
                yield f"{split}-{numbers[split]:06d}.tar", tuple(waiting.pop(split))
                numbers[split] += 1
        for split, rest in waiting.items():
            yield f"{split}-{numbers[split]:06d}.tar", tuple(rest)


class _Counted:
    """Adds up what the builders report."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._users, self._images = progress, 0, 0

    def __call__(self, *, users: int, images: int) -> None:
        self._users += users
        self._images += images
        if self._progress is not None:
            self._progress(users=self._users, images=self._images)


def run_jobs(jobs: Iterable[PackJob], *, num_workers: int, done: Progress) -> list[Packed]:
    """Run jobs in order, in this process or in several, with a bounded number of them under way."""
    if num_workers <= 1:
        return [pack(job, done=lambda images: done(users=1, images=images)) for job in jobs]
    results: list[Packed] = []
    waiting: deque[tuple[Future[Packed], int]] = deque()

    def collect() -> None:
        future, users = waiting.popleft()
        results.append(future.result())
        done(users=users, images=results[-1].images)

    with ProcessPoolExecutor(num_workers) as pool:
        try:
            for job in jobs:
                waiting.append((pool.submit(pack, job), len(job.users)))
                if len(waiting) >= 2 * num_workers:
                    collect()
            while waiting:
                collect()
        except BrokenProcessPool:
            raise DataError("a building process was killed, perhaps for memory; use --workers 1") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return results


def _index_of(packed: list[Packed]) -> ShardIndex:
    splits: dict[Split, list[ShardEntry]] = {}
    dropped: Counter[str] = Counter()
    for result in packed:
        dropped.update(result.dropped)
        if result.entry is not None:
            split = cast(Split, result.entry.name.partition("-")[0])
            splits.setdefault(split, []).append(result.entry)
    return ShardIndex(
        kind="histories",
        splits={name: tuple(shards) for name, shards in splits.items()},
        dropped=dict(dropped),
    )
