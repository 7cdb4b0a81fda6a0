"""``prefgen data``: from histories to shards, and what is in them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefgen.commands.data_build import add_build
from prefgen.commands.data_encode import add_encode
from prefgen.commands.data_import import add_import
from prefgen.commands.data_stamps import add_stamps
from prefgen.errors import ConfigError, DataError
from prefgen.schema import Split

if TYPE_CHECKING:
    from prefgen.data.agents.subjects import Subjects
    from prefgen.data.verify import SplitSummary, Summary


def add_parser(subparsers: Any) -> None:
    """Add ``data`` and its actions."""
    text = "make, pack, look at and check histories"
    parser = subparsers.add_parser("data", help=text, description=text.capitalize() + ".")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_agents(actions)
    _add_drawings(actions)
    add_stamps(actions)
    add_import(actions)
    add_build(actions)
    add_encode(actions)
    _add_inspect(actions)
    _add_verify(actions)


def _add_agents(actions: Any) -> None:
    text = "simulate users over drawings: histories with known tastes"
    parser = actions.add_parser("agents", help=text, description=text.capitalize() + ".")
    parser.add_argument("--out", type=Path, required=True, help="folder for history.jsonl and its images")
    parser.add_argument("--train", type=int, default=1000, help="agents to learn from (1000)")
    parser.add_argument("--validation", type=int, default=64, help="agents to watch training by (64)")
    parser.add_argument(
        "--test", type=int, default=128, help="agents, over unseen subjects, to judge by (128)"
    )
    parser.add_argument("--min-images", type=int, default=16, help="fewest images on either side (16)")
    parser.add_argument("--max-images", type=int, default=26, help="most images on either side (26)")
    parser.add_argument("--image-size", type=int, default=64, help="side of an image in pixels (64)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (0)")
    _add_subjects(parser)
    parser.set_defaults(run=run_agents)


def _add_drawings(actions: Any) -> None:
    text = "draw captioned shards for training base models from scratch"
    parser = actions.add_parser("drawings", help=text, description=text.capitalize() + ".")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--train", type=int, default=90_000, help="drawings to learn from (90000)")
    parser.add_argument("--staged", type=int, default=40_000, help="subjects centered in any scene (40000)")
    parser.add_argument("--studies", type=int, default=30_000, help="plain ones, to learn shapes by (30000)")
    parser.add_argument("--heldout", type=int, default=4_000, help="unseen drawings, for gates (4000)")
    parser.add_argument("--judge", type=int, default=60_000, help="drawings for the judge alone (60000)")
    parser.add_argument("--image-size", type=int, default=64, help="side of a drawing in pixels (64)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (0)")
    _add_subjects(parser)
    parser.set_defaults(run=run_drawings)


def _add_subjects(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--subjects", type=Path, metavar="DIR", help="what 'prefgen data stamps' wrote (OpenMoji's drawings)"
    )
    parser.add_argument(
        "--workers", type=int, default=None, help="processes; changes nothing else (all cores)"
    )


def _subjects(folder: Path | None) -> Subjects:
    from prefgen.data.agents.cutouts import SubjectFolder
    from prefgen.data.agents.drawings import OPENMOJI

    return OPENMOJI if folder is None else SubjectFolder(folder)


def _add_inspect(actions: Any) -> None:
    text = "show what a folder of shards holds"
    parser = actions.add_parser("inspect", help=text, description=text.capitalize() + ".")
    parser.add_argument("path", type=Path, help="folder of shards")
    parser.set_defaults(run=run_inspect)


def _add_verify(actions: Any) -> None:
    text = "read every byte of a folder of shards and list what is wrong"
    parser = actions.add_parser("verify", help=text, description=text.capitalize() + ". Repairs nothing.")
    parser.add_argument("path", type=Path, help="folder of shards")
    parser.add_argument("--workers", type=int, default=None, help="processes (one per core)")
    parser.set_defaults(run=run_verify)


def run_agents(args: argparse.Namespace) -> int:
    """``prefgen data agents``."""
    from prefgen.data.agents.contact import attribute_sheet, history_sheet
    from prefgen.data.agents.render import AgentsPlan, agent_history, write_agents

    plan = AgentsPlan(
        num_users={"train": args.train, "validation": args.validation, "test": args.test},
        min_images=args.min_images,
        max_images=args.max_images,
        image_size=args.image_size,
        seed=args.seed,
        subjects=_subjects(args.subjects),
    )
    path = write_agents(args.out, plan=plan, num_workers=args.workers)
    split: Split = next(name for name, count in plan.num_users.items() if count)
    shown = [agent_history(i, split, plan=plan) for i in range(min(4, plan.num_users[split]))]
    attribute_sheet(seed=args.seed, subjects=plan.subjects).save(args.out / "attributes.png")
    history_sheet(shown, subjects=plan.subjects).save(args.out / "histories.png")
    counts = ", ".join(f"{count:,} {name}" for name, count in plan.num_users.items())
    print(f"{sum(plan.num_users.values()):,} agents ({counts}) are in {path}")
    print(f"look at {args.out / 'attributes.png'} and {args.out / 'histories.png'}")
    return 0


def run_drawings(args: argparse.Namespace) -> int:
    """``prefgen data drawings``."""
    from prefgen.data.agents.render import DrawingSplit, write_drawings

    counts: dict[DrawingSplit, int] = {
        "train": args.train,
        "staged": args.staged,
        "studies": args.studies,
        "heldout": args.heldout,
        "judge": args.judge,
    }
    paths = write_drawings(
        args.out,
        counts=counts,
        seed=args.seed,
        image_size=args.image_size,
        num_workers=args.workers,
        subjects=_subjects(args.subjects),
    )
    print(f"{sum(counts.values()):,} captioned drawings are in {len(paths)} shards at {args.out}")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """``prefgen data inspect``."""
    from prefgen.data.verify import inspect

    print(format_summary(inspect(args.path)))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """``prefgen data verify``.

    Raises:
        DataError: something is wrong; the list is printed before.
    """
    from tqdm import tqdm

    from prefgen.data.index import read_index
    from prefgen.data.verify import verify

    if args.workers is not None and args.workers < 0:
        raise ConfigError(f"--workers must be 0 or more, got {args.workers}")
    index = read_index(args.path)
    total = sum(shard.size for shards in index.splits.values() for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", dynamic_ncols=True, delay=0.3) as bar:

        def show(*, shards: int, bytes: int) -> None:
            bar.set_postfix(shards=shards, refresh=False)
            bar.update(bytes - bar.n)

        report = verify(args.path, num_workers=args.workers, progress=show)
    for problem in report.problems:
        print(problem)
    print(
        f"read {report.shards:,} shards, {report.users:,} users, {report.images:,} images, "
        f"{report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s"
    )
    if report.problems:
        raise DataError(
            f"{args.path}: {len(report.problems):,} problem(s), listed above; build or copy it again"
        )
    print(f"{args.path}: all well")
    return 0


def format_summary(summary: Summary) -> str:
    """The table of ``prefgen data inspect``."""
    lines = [
        f"{summary.path}: {summary.kind}, schema version {summary.schema_version}",
        "",
        f"{'split':<12}{'users':>9}{'samples':>9}{'liked':>10}{'disliked':>10}{'shards':>8}{'MB':>10}",
    ]
    for split, found in summary.splits.items():
        counts = found.counts
        lines.append(
            f"{split:<12}{counts.users:>9,}{found.samples:>9,}{counts.liked:>10,}{counts.disliked:>10,}"
            f"{found.shards:>8,}{counts.bytes / 1e6:>10,.1f}"
        )
    if summary.kind == "histories":
        for split, found in summary.splits.items():
            lines += ["", f"images per user, {split}:", *_histogram(found)]
    if summary.header:
        lines += ["", "made by: " + json.dumps(dict(summary.header), indent=2, ensure_ascii=False)]
    if summary.dropped:
        lines += ["", "left out when built:"]
        lines += [f"  {count:,} x {reason}" for reason, count in sorted(summary.dropped.items())]
    return "\n".join(lines)


def _histogram(found: SplitSummary, *, num_bins: int = 8) -> list[str]:
    """Users by number of liked and of disliked images, in at most ``num_bins`` rows."""
    sides = (found.liked_histogram, found.disliked_histogram)
    low = min(min(side) for side in sides)
    high = max(max(side) for side in sides)
    width = -(-(high - low + 1) // num_bins)
    rows = [f"  {'images':>9}{'liked':>9}{'disliked':>10}"]
    for start in range(low, high + 1, width):
        stop = min(start + width - 1, high)
        name = str(start) if start == stop else f"{start}-{stop}"
        users = [sum(count for n, count in side.items() if start <= n <= stop) for side in sides]
        if any(users):
            rows.append(f"  {name:>9}{users[0]:>9,}{users[1]:>10,}")
    return rows
