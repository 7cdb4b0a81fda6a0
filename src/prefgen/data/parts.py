"""One set of shards by several processes that share nothing but a folder: each its part, then a merge.

A part writes into ``OUT/.parts``: the very tar files that one process would have written, and an index of its
own. The merge moves all tars to ``OUT`` and writes ``index.json``, so a set is whole or not there.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from prefgen.data.index import (
    ALL_SPLITS,
    INDEX_NAME,
    SHARD_NAME,
    ShardEntry,
    ShardIndex,
    check_unique_users,
    read_index,
    write_index,
)
from prefgen.errors import DataError
from prefgen.schema import Split

PARTS_FOLDER = ".parts"
_PART_NAME = re.compile(r"index\.part-(\d+)-of-(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of ``count`` parts, ``number`` from 0."""

    number: int
    count: int

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.number < self.count:
            raise DataError(f"part {self.number} of {self.count}: expected 0 <= part < number of parts")

    @property
    def index_name(self) -> str:
        """File of the part's own index."""
        return f"index.part-{self.number:04d}-of-{self.count:04d}.json"

    def share(self, total: int) -> range:
        """The contiguous share of ``total`` things that is this part's; shares differ by at most one."""
        return range(self.number * total // self.count, (self.number + 1) * total // self.count)

    @staticmethod
    def parse(text: str) -> Part:
        """``3/8`` as the fourth of eight parts.

        Raises:
            DataError: not two numbers, or out of range.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None:
            raise DataError(f"expected a part like 0/8 (number from 0 / number of parts), got '{text}'")
        return Part(number=int(found[1]), count=int(found[2]))

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> Part:
        """The part that a Slurm array, torchrun or srun gives this process.

        Raises:
            DataError: none of them started it.
        """
        known = os.environ if environment is None else environment
        for number, count, first in (
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
            ("RANK", "WORLD_SIZE", None),
            ("SLURM_PROCID", "SLURM_NTASKS", None),
        ):
            if number in known and count in known:
                start = int(known.get(first, "0")) if first else 0
                return Part(number=int(known[number]) - start, count=int(known[count]))
        raise DataError(
            "--part auto needs a Slurm array job, torchrun or srun, and this process has none of them; "
            "write --part 0/8"
        )


WHOLE = Part(number=0, count=1)


def write_part_index(index: ShardIndex, *, out: Path, part: Part, plan: str) -> Path:
    """The index of a finished part; ``plan`` names what was built from what, and is equal in all parts."""
    header = {"part_plan": plan, "own_header": dict(index.header)}
    return write_index(replace(index, header=header), out=out / PARTS_FOLDER, name=part.index_name)


def merge_parts(out: Path, *, count: int | None = None, overwrite: bool = True) -> ShardIndex:
    """Make one set of finished parts.

    Args:
        out: the folder that the parts were built for.
        count: how many parts there must be; default what their names say.
        overwrite: replace an earlier set in ``out``.

    Raises:
        DataError: parts are missing or were built from different things, two of them hold one user, no users
            at all, or ``out`` is occupied.
    """
    folder = out / PARTS_FOLDER
    indexes = _read_parts(folder, count=count)
    splits = _joined(indexes, where=folder)
    dropped: Counter[str] = Counter()
    for index in indexes:
        dropped.update(index.dropped)
    header = indexes[0].header["own_header"]
    merged = ShardIndex(kind=indexes[0].kind, splits=splits, header=header, dropped=dict(dropped))
    if not splits:
        raise DataError(f"{folder}: no users with images in any of {len(indexes)} parts")
    check_unique_users(merged, where=str(folder))
    names = [shard.name for shards in splits.values() for shard in shards]
    _move(names, folder=folder, out=out, overwrite=overwrite)
    write_index(merged, out=out)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return merged


def _read_parts(folder: Path, *, count: int | None) -> list[ShardIndex]:
    found: dict[int, Path] = {}
    counts: set[int] = set()
    for path in sorted(folder.glob("index.part-*.json")) if folder.is_dir() else []:
        match = _PART_NAME.fullmatch(path.name)
        if match is not None and (count is None or int(match[2]) == count):
            found[int(match[1])] = path
            counts.add(int(match[2]))
    if len(counts) != 1:
        what = f"parts of different numbers ({sorted(counts)})" if counts else "no finished parts"
        raise DataError(f"{what} in {folder}; build them with 'prefgen data build --part I/N'")
    missing = sorted(set(range(counts.pop())) - found.keys())
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (" .." if len(missing) > 8 else "")
        raise DataError(f"{folder}: part(s) {shown} are not finished; run them again, then merge")
    indexes = [read_index(found[number]) for number in sorted(found)]
    plans = {(index.kind, index.header.get("part_plan")) for index in indexes}
    if len(plans) != 1 or any("own_header" not in index.header for index in indexes):
        raise DataError(
            f"{folder}: the parts were built from different histories or settings; build all again"
        )
    return indexes


def _joined(indexes: list[ShardIndex], *, where: Path) -> dict[Split, tuple[ShardEntry, ...]]:
    splits: dict[Split, tuple[ShardEntry, ...]] = {}
    for split in ALL_SPLITS:
        shards = sorted((s for i in indexes for s in i.splits.get(split, ())), key=lambda shard: shard.name)
        names = [shard.name for shard in shards]
        if len(set(names)) != len(names):
            raise DataError(f"{where}: two parts hold a shard of the same name; build all parts again")
        if shards:
            splits[split] = tuple(shards)
    return splits


def _move(names: list[str], *, folder: Path, out: Path, overwrite: bool) -> None:
    """Move the tars. One that is already in ``out`` was moved by a merge that was killed."""
    waiting = [name for name in names if (folder / name).is_file()]
    absent = [name for name in names if name not in set(waiting) and not (out / name).is_file()]
    if absent:
        raise DataError(f"{folder}: {absent[0]} is missing; build its part again")
    earlier = [path for path in out.glob("*.tar") if SHARD_NAME.fullmatch(path.name)]
    if (out / INDEX_NAME).exists() and not overwrite:
        raise DataError(f"{out} already holds shards; pass --overwrite to replace them")
    (out / INDEX_NAME).unlink(missing_ok=True)
    kept = set(names) - set(waiting)
    for path in earlier:
        if path.name not in kept:
            path.unlink()
    for name in waiting:
        (folder / name).replace(out / name)
