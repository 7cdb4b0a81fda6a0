"""``prefgen data import``: other people's data sets as histories, cleaned, with a report and a data card."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prefgen.data.sources.steps import (
    DEFAULT_MIN_JUDGEMENTS,
    DEFAULT_NEAR_DISTANCE,
    IMPORTERS,
    STEPS,
    parse_steps,
)
from prefgen.schema import SOURCES

if TYPE_CHECKING:
    from prefgen.data.sources.importing import Imported, ImportStage


class _ListCleaning(argparse.Action):
    """``--list-cleaning``: like ``--help``, whatever else is missing."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        for name, text in STEPS.items():
            print(f"{name:<18}{text}")
        parser.exit(0)


def add_import(actions: Any) -> None:
    """Add ``import`` to the actions of ``prefgen data``."""
    text = "read another data set into history.jsonl and images"
    layouts = "\n".join(f"  {name:<16}{what}" for name, what in IMPORTERS.items())
    parser = actions.add_parser(
        "import", help=text, description=f"{text.capitalize()}.\n\nsources:\n{layouts}"
    )
    parser.add_argument(
        "source", choices=tuple(IMPORTERS), metavar="SOURCE", help="what PATH holds, see above"
    )
    parser.add_argument("path", type=Path, help="its folder or file; nothing outside it is read")
    parser.add_argument("--out", type=Path, required=True, help="folder for history.jsonl and its images")
    parser.add_argument("--licence", default="not stated", help="of the images, for the report (not stated)")
    parser.add_argument(
        "--clean", default="all", help="steps with commas, all or none; --list-cleaning shows them (all)"
    )
    parser.add_argument("--list-cleaning", action=_ListCleaning, help="show the cleaning steps and leave")
    parser.add_argument(
        "--near-distance",
        type=int,
        default=DEFAULT_NEAR_DISTANCE,
        help=f"bits of 64 in which near-duplicates may differ ({DEFAULT_NEAR_DISTANCE})",
    )
    parser.add_argument(
        "--min-judgements",
        type=int,
        default=DEFAULT_MIN_JUDGEMENTS,
        help=f"fewest judged images of a user who stays ({DEFAULT_MIN_JUDGEMENTS})",
    )
    parser.add_argument(
        "--fractions", default="0.9,0.05,0.05", help="train,validation,test; each line names its split"
    )
    parser.add_argument("--judged-by", choices=SOURCES, help="agent or human, instead of what SOURCE says")
    parser.add_argument(
        "--workers", type=int, default=None, help="threads that decode; changes nothing else (all cores)"
    )
    parser.set_defaults(run=run_import)


def run_import(args: argparse.Namespace) -> int:
    """``prefgen data import``."""
    from prefgen.commands.data_build import split_fractions

    clean, fractions = parse_steps(args.clean), split_fractions(args.fractions)
    from prefgen.data.shards import assign_split
    from prefgen.data.sources import importing
    from prefgen.data.sources.catalogue import open_source

    plan = importing.ImportPlan(
        clean=clean,
        near_distance=args.near_distance,
        min_judgements=args.min_judgements,
        fractions=fractions,
        judged_by=args.judged_by,
        licence=args.licence,
        command=shlex.join(["prefgen", *sys.argv[1:]]),
        num_workers=min(8, os.cpu_count() or 1) if args.workers is None else args.workers,
    )
    assign_split("", fractions=fractions)  # complains about fractions before anything is read
    opened = open_source(args.source, path=args.path)
    with _Bars(unit=opened.unit) as bars:
        imported = importing.run_import(opened, out=args.out, plan=plan, progress=bars.show)
    print(format_imported(imported, out=args.out))
    return 0


class _Bars:
    """One progress bar a stage, with rate and time left."""

    def __init__(self, *, unit: str) -> None:
        self._unit = unit
        self._stage = ""
        self._bar: Any = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, stage: ImportStage, *, done: int, total: int, note: str) -> None:
        """See ``ImportProgress``."""
        from tqdm import tqdm

        if stage != self._stage:
            self.__exit__()
            unit = {"read": self._unit, "checksum": "file", "clean": "step", "write": "user"}[stage]
            # An import that goes on starts where it stood, or the rate would count what was read before.
            self._bar = tqdm(
                total=total, initial=done if stage == "read" else 0, unit=unit, unit_scale=unit == "B",
                desc=stage, dynamic_ncols=True, delay=0.3,
            )  # fmt: skip
            self._stage = stage
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)


def format_imported(imported: Imported, *, out: Path) -> str:
    """What ``prefgen data import`` prints in the end."""
    report = imported.report
    kept = report["kept"]
    lines = [
        f"{split}: {c['users']:,} users, {c['liked']:,} liked, {c['disliked']:,} disliked images"
        for split, c in kept["splits"].items()
    ]
    for step in report["cleaning"]:
        if step["judgements"]:
            lines.append(f"left out: {step['judgements']:,} x {step['step']} ({step['users']:,} users)")
    lines += [f"left out: {number:,} x {reason}" for reason, number in report["skipped"].items()]
    where = f"{kept['users']:,} users and {kept['images']:,} images are in {out / 'history.jsonl'}"
    lines.append(f"nothing to do, the import is finished: {where}" if imported.was_finished else where)
    lines.append(f"look at {out / 'card.png'}; every count is in {out / 'import.json'}")
    return "\n".join(lines)
