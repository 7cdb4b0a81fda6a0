"""``prefgen data build`` and ``prefgen data merge``: histories and images into shards, by one or by many."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefgen.errors import ConfigError

if TYPE_CHECKING:
    from prefgen.data.index import ShardIndex


def add_build(actions: Any) -> None:
    """Add ``build`` and ``merge``."""
    text = "pack histories and their images into shards"
    parser = actions.add_parser("build", help=text, description=text.capitalize() + ".")
    parser.add_argument("--history", type=Path, required=True, help="history.jsonl; images relative to it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards and index.json")
    parser.add_argument("--users-per-shard", type=int, default=64, help="users in one tar file (64)")
    parser.add_argument(
        "--max-images-per-sample", type=int, default=64, help="a user with more becomes several samples (64)"
    )
    parser.add_argument(
        "--fractions",
        default="0.9,0.05,0.05",
        help="train,validation,test of users whose line names none",
    )
    parser.add_argument("--max-side", type=int, default=0, help="shrink larger images; 0 keeps all sizes (0)")
    parser.add_argument(
        "--on-bad",
        choices=("raise", "skip"),
        default="raise",
        help="stop at the first bad image, or leave bad images out and count them (raise)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the shards already in --out")
    parser.add_argument(
        "--workers", type=int, default=None, help="processes; changes nothing else (one per core)"
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="build only part I (from 0) of N, for 'data merge'; auto takes it from Slurm or torchrun",
    )
    parser.set_defaults(run=run_build)
    text = "join the parts that 'data build --part' has built"
    parser = actions.add_parser("merge", help=text, description=text.capitalize() + ".")
    parser.add_argument("path", type=Path, help="the folder given to every part as --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards already there")
    parser.set_defaults(run=run_merge)


def run_build(args: argparse.Namespace) -> int:
    """``prefgen data build``."""
    from tqdm import tqdm

    from prefgen.data.parts import Part
    from prefgen.data.shards import count_histories, read_histories, write_shards
    from prefgen.data.user_samples import BuildLimits

    fractions = split_fractions(args.fractions)
    if args.workers is not None and args.workers < 0:
        raise ConfigError(f"--workers must be 0 or more, got {args.workers}")
    part = None
    if args.part is not None:
        part = Part.from_environment() if args.part == "auto" else Part.parse(args.part)
        if args.overwrite:
            raise ConfigError("--overwrite belongs to 'prefgen data merge' where shards are built in parts")
    total = count_histories(args.history) // (1 if part is None else part.count)
    with tqdm(total=total, unit="user", desc="build", dynamic_ncols=True, delay=0.3) as bar:

        def show(*, users: int, images: int) -> None:
            bar.set_postfix(images=images, refresh=False)
            bar.update(users - bar.n)

        index = write_shards(
            read_histories(args.history),
            root=args.history.parent,
            out=args.out,
            users_per_shard=args.users_per_shard,
            max_images_per_sample=args.max_images_per_sample,
            fractions=fractions,
            on_bad=args.on_bad,
            limits=BuildLimits(max_side=args.max_side),
            overwrite=args.overwrite,
            num_workers=(os.cpu_count() or 1) if args.workers is None else args.workers,
            part=part,
            progress=show,
        )
    _print_counts(index)
    if part is None:
        print(f"shards are in {args.out}")
    else:
        print(f"part {part.number} of {part.count} is built; after all parts: prefgen data merge {args.out}")
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """``prefgen data merge``."""
    from prefgen.data.parts import merge_parts

    _print_counts(merge_parts(args.path, overwrite=args.overwrite))
    print(f"shards are in {args.path}")
    return 0


def _print_counts(index: ShardIndex) -> None:
    for split in index.splits:
        counts = index.counts(split)
        print(
            f"{split}: {counts.users:,} users, {counts.liked:,} liked, {counts.disliked:,} disliked images, "
            f"{counts.bytes / 1e6:,.1f} MB"
        )
    for reason, count in sorted(index.dropped.items()):
        print(f"left out: {count:,} x {reason}")


def split_fractions(text: str) -> tuple[float, float, float]:
    """``--fractions``: shares of train, validation and test.

    Raises:
        ConfigError: not three numbers.
    """
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--fractions: expected three numbers like 0.9,0.05,0.05, got '{text}'") from None
    return train, validation, test
