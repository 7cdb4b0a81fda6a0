"""``prefgen evaluate study``: run a plan of many runs, resumable, and write its report."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from prefgen.study.plan import Plan, read_plan

_EPILOG = """\
examples:
  prefgen evaluate study --plan studies/reproduce.yaml --work work/reproduce
  prefgen evaluate study --plan studies/reproduce.yaml --work work/reproduce --only main --only no_core
  prefgen evaluate study --plan studies/reproduce.yaml --work work/reproduce --dry-run
  prefgen evaluate study --plan studies/reproduce.yaml --work work/reproduce --report-only
  prefgen evaluate study --plan studies/reproduce.yaml --work work/x --preset paper --shards work/paper/shards

Every step is a prefgen command in a process of its own; what is done is written down at once in WORK/runs.
The same command again goes on where it was stopped. A run that fails is named at the end and stops no other.
"""


def add_study_parser(subparsers: Any) -> None:
    """Add ``study`` to the actions of ``prefgen evaluate``."""
    text = "run a plan of many runs, resumable, and write its report"
    parser = subparsers.add_parser("study", help=text, description=text + ".", epilog=_EPILOG)
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="the plan")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the study")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report (default: WORK/study)")
    parser.add_argument(
        "--preset", default="mini", metavar="NAME", help="whose models; the plan names which (default: mini)"
    )
    parser.add_argument(
        "--shards", type=Path, metavar="DIR", help="histories that exist, instead of the plan's own"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run this one; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="print every command and do nothing")
    parser.add_argument("--report-only", action="store_true", help="run nothing, report what is finished")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run and report.

    Raises:
        PrefgenError: a plan that cannot be used, or nothing to report.
    """
    plan = read_plan(args.plan, preset=args.preset, shards=args.shards)
    if args.dry_run:
        _print_commands(plan, work=args.work)
        return 0
    failed: dict[str, str] = {}
    if not args.report_only:
        from prefgen.study.runner import run_plan

        outcome = run_plan(plan, work=args.work, only=args.only)
        failed = outcome.failed
        print(f"{len(outcome.done)} runs finished, {len(failed)} failed")
    for name, error in failed.items():
        print(f"failed: {name}: {error}")
    from prefgen.study.writing import write_study

    report = write_study(plan, work=args.work, out=args.out or args.work / "study")
    verdict = report.study["main"]["verdict"]
    print(f"the claim of the main table {'holds' if verdict['holds'] else 'does not hold'}")
    for name in report.study["missing"]:
        print(f"not finished: {name}")
    for name, place in report.places.items():
        print(f"{name}: {place}")
    return 1 if failed else 0


def _print_commands(plan: Plan, *, work: Path) -> None:
    for one in plan.runs:
        print(f"# {one.folder}")
        for value in one.trial.values if one.trial is not None else ():
            for command in plan.trial_commands(one, work=work, value=value):
                print(f"prefgen {shlex.join(command)}")
        for command in plan.commands(one, work=work, values={"best": "BEST"}):
            print(f"prefgen {shlex.join(command)}")
