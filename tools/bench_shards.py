"""Our shard reader beside plain webdataset and raw tar reading; building rate; memory; seek time.

    python tools/bench_shards.py --folder work/bench --out work/bench_shards.json

One run makes two sets of shards (a readable one of --users users with pictures, and one of --many samples
of a few
hundred bytes each), then prints one table a question:

1. samples and bytes a second of raw tar reading, plain webdataset and our loader (its order, its checks,
its
   position for a resume), with 0, 1 and 2 workers, all over the same tar files, which lie in the page
cache;
2. resident memory over --many samples, every tenth of them;
3. users and megabytes a second of building, with 1 and all cores;
4. seconds from a fresh reader to the first batch at 0 % and at 90 % of an epoch of --many samples.

Every rate is the best of --repeats passes: a machine that does something else meanwhile only ever slows a
pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset

from prefgen.data.index import read_index
from prefgen.data.loader import ResumableLoader
from prefgen.data.reader import ShardReader, UserSample
from prefgen.data.shards import read_histories, write_shards
from prefgen.testing.data import write_raw

torch.set_num_threads(1)


class Users:
    """What a stage would see: whole users, as bytes."""

    def __init__(self, root: Path) -> None:
        self._reader = ShardReader(root, split="train")
        self.shard_sizes = self._reader.shard_sizes

    def __len__(self) -> int:
        return len(self._reader)

    def example(self, index: int, *, epoch: int) -> UserSample:
        """One user."""
        del epoch
        sample = self._reader[index]
        assert sample is not None
        return sample


def count_users(examples: list[UserSample]) -> tuple[int, int]:
    """Samples and image bytes of a batch: the bytes stay in the worker on every side of the comparison."""
    return len(examples), sum(len(data) for one in examples for data in (*one.liked, *one.disliked))


def count_dicts(samples: list[dict[str, Any]]) -> tuple[int, int]:
    """The same of webdataset's samples."""
    sizes = (len(v) for one in samples for k, v in one.items() if isinstance(v, bytes) and "history" not in k)
    return len(samples), sum(sizes)


def ours(root: Path, *, workers: int, batch: int, windowed: bool) -> Iterator[tuple[int, int]]:
    """Our loader, shuffled: over everything, or in windows of shards."""
    loader = ResumableLoader(
        Users(root),
        batch_size=batch,
        seed=0,
        shuffle=True,
        drop_last=False,
        num_workers=workers,
        collate_fn=count_users,
        window_shards=8 if windowed else None,
    )
    for counts in loader:
        loader.state_dict()
        yield counts
    loader.close()


def plain(root: Path, *, workers: int, batch: int) -> Iterator[tuple[int, int]]:
    """Webdataset with its own shuffle and nothing else: no checks, no order to come back to."""
    shards = [str(root / shard.name) for shard in read_index(root).splits["train"]]
    dataset = (
        webdataset.WebDataset(
            shards, shardshuffle=len(shards), workersplitter=webdataset.split_by_worker, seed=0
        )
        .shuffle(1000)
        .batched(batch, collation_fn=count_dicts)
    )
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


def raw(root: Path) -> Iterator[tuple[int, int]]:
    """Every member of every tar, by tarfile's stream, in order."""
    for shard in read_index(root).splits["train"]:
        size = 0
        with tarfile.open(root / shard.name, "r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                size += 0 if member.name.endswith("history.json") else len(data)
        yield len(shard.samples), size


def rate(make: Callable[[], Iterator[tuple[int, int]]], *, repeats: int) -> dict[str, float]:
    """Samples and image bytes a second, of the best pass."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        start, samples, size = time.perf_counter(), 0, 0
        for found, length in make():
            samples += found
            size += length
        seconds = time.perf_counter() - start
        if not best or samples / seconds > best["samples_per_second"]:
            best = {"samples_per_second": samples / seconds, "mb_per_second": size / seconds / 1e6}
    return best | {"samples": samples}


def reading(root: Path, *, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Question 1."""
    rows: list[dict[str, Any]] = [
        {"reader": "raw tar", "workers": 0, **rate(lambda: raw(root), repeats=repeats)}
    ]
    for workers in (0, 1, 2):
        for name, make in (
            ("webdataset", lambda w=workers: plain(root, workers=w, batch=batch)),
            ("prefgen", lambda w=workers: ours(root, workers=w, batch=batch, windowed=False)),
            (
                "prefgen, windows of 8 shards",
                lambda w=workers: ours(root, workers=w, batch=batch, windowed=True),
            ),
        ):
            rows.append({"reader": name, "workers": workers, **rate(make, repeats=repeats)})
    print("\n| reader | workers | samples/s | image MB/s | of webdataset |\n|---|---|---|---|---|")
    for row in rows:
        base = next((r for r in rows if r["reader"] == "webdataset" and r["workers"] == row["workers"]), None)
        share = "" if base is None else f"{row['samples_per_second'] / base['samples_per_second']:.2f}"
        print(
            f"| {row['reader']} | {row['workers']} | {row['samples_per_second']:.0f} | "
            f"{row['mb_per_second']:.1f} | {share} |"
        )
    return rows


def memory(root: Path, *, batch: int) -> list[dict[str, float]]:
    """Question 2: in this process, without workers."""
    gc.collect()
    before = _resident_mb()
    users = Users(root)
    gc.collect()
    print(f"\nthe index of {len(users):,} users takes {_resident_mb() - before:.0f} MB in memory")
    rows = [{"samples": 0, "resident_mb": _resident_mb(), "index_mb": _resident_mb() - before}]
    samples = 0
    loader = ResumableLoader(
        users,
        batch_size=batch,
        seed=0,
        shuffle=True,
        drop_last=False,
        num_workers=0,
        collate_fn=count_users,
    )
    step = max(1, len(loader) // 10)
    for number, (found, _) in enumerate(loader):
        samples += found
        if number % step == 0:
            gc.collect()
            rows.append({"samples": samples, "resident_mb": _resident_mb()})
    print("\n| samples read | resident memory, MB |\n|---|---|")
    for row in rows:
        print(f"| {row['samples']:,} | {row['resident_mb']:.1f} |")
    return rows


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def building(history: Path, *, folder: Path, repeats: int) -> list[dict[str, float]]:
    """Question 3."""
    rows = []
    print("\n| workers | users/s | MB/s |\n|---|---|---|")
    for workers in sorted({1, os.cpu_count() or 1}):
        seconds = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            index = write_shards(
                read_histories(history),
                root=history.parent,
                out=folder / f"built-{workers}",
                overwrite=True,
                num_workers=workers,
            )
            seconds = min(seconds, time.perf_counter() - start)
        counts = [index.counts(split) for split in index.splits]
        row = {
            "workers": workers,
            "users_per_second": sum(c.users for c in counts) / seconds,
            "mb_per_second": sum(c.bytes for c in counts) / seconds / 1e6,
        }
        rows.append(row)
        print(f"| {workers} | {row['users_per_second']:.1f} | {row['mb_per_second']:.1f} |")
    return rows


def seeking(root: Path, *, batch: int) -> dict[str, float]:
    """Question 4: a fresh reader and loader each time, as after a kill."""
    seconds = {}
    for share in (0.0, 0.9):
        start = time.perf_counter()
        loader = ResumableLoader(
            Users(root),
            batch_size=batch,
            seed=0,
            shuffle=True,
            drop_last=True,
            num_workers=0,
            collate_fn=count_users,
        )
        loader.load_state_dict({**loader.state_dict(), "batches_done": int(len(loader) * share)})
        next(iter(loader))
        seconds[f"{share:.0%}"] = time.perf_counter() - start
    gap = abs(seconds["90%"] - seconds["0%"])
    print(
        f"\nfirst batch: {seconds['0%']:.2f} s at 0 %, {seconds['90%']:.2f} s at 90 %, difference {gap:.2f} s"
    )
    return seconds


def make_sets(folder: Path, *, users: int, many: int, images: int) -> tuple[Path, Path, Path]:
    """History file, readable set, set of many small samples; made once, kept for the next run."""
    raw_users, raw_many = folder / f"raw-{users}x{images}", folder / f"raw-many-{many}"
    readable, small = folder / f"shards-{users}x{images}", folder / f"shards-many-{many}"
    history = raw_users / "history.jsonl"
    if not history.is_file():
        write_raw(raw_users, num_users=users, num_liked=images, num_disliked=images, splits=False)
    if not (readable / "index.json").is_file():
        write_shards(
            read_histories(history), root=raw_users, out=readable, fractions=(1.0, 0.0, 0.0), overwrite=True
        )
    if not (small / "index.json").is_file():
        raw_many.mkdir(parents=True, exist_ok=True)
        one = write_raw(raw_many / "one", num_users=1, num_liked=1, num_disliked=0, splits=False)
        line = json.loads(one.read_text())
        path = raw_many / "one" / "many.jsonl"
        with path.open("w") as file:
            for number in range(many):
                file.write(json.dumps(line | {"user_id": f"u{number:07d}"}) + "\n")
        write_shards(
            read_histories(path),
            root=path.parent,
            out=small,
            users_per_shard=1000,
            fractions=(1.0, 0.0, 0.0),
            num_workers=os.cpu_count() or 1,
            overwrite=True,
        )
    return history, readable, small


def main() -> None:
    """Make the sets, answer the four questions, keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the sets go and stay")
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--images", type=int, default=10, help="on either side of a user")
    parser.add_argument("--many", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="json file for the figures")
    args = parser.parse_args()
    history, readable, small = make_sets(args.folder, users=args.users, many=args.many, images=args.images)
    figures = {
        "reading": reading(readable, batch=args.batch, repeats=args.repeats),
        "memory": memory(small, batch=args.batch),
        "building": building(history, folder=args.folder, repeats=args.repeats),
        "seeking": seeking(small, batch=args.batch),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "cores": os.cpu_count(),
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(f"\nfigures: {args.out}")


if __name__ == "__main__":
    main()
