"""``prefgen fit | validate | test | predict --stage S``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from prefgen.config import PRESETS, load_config, to_yaml
from prefgen.stages import STAGES

logger = logging.getLogger(__name__)

_VERBS = {
    "fit": "train a stage, or go on where its run folder stopped",
    "validate": "measure a trained stage on the validation users",
    "test": "measure a trained stage on the test users",
    "predict": "write what a trained stage predicts (probe: every user's embeddings)",
}
_EPILOG = """\
examples:
  prefgen {verb} --stage align
  prefgen {verb} --stage align --preset mini workdir=work/x trainer.max_steps=100 data.batch_size=64
  prefgen {verb} --stage align --dry-run          print the resolved configuration and do nothing

'prefgen config --stage S' lists every key with its type, default and meaning. fit writes into run_dir
(default: workdir/<stage>) and, called again, goes on from its last checkpoint; then only trainer.max_steps,
trainer.max_epochs, logging and loader.num_workers may change.
"""


def add_parser(subparsers: Any) -> None:
    """Add the four verbs."""
    for verb, text in _VERBS.items():
        parser = subparsers.add_parser(
            verb, help=text, description=text.capitalize() + ".", epilog=_EPILOG.format(verb=verb)
        )
        add_stage_options(parser)
        parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration only")
        parser.set_defaults(run=run)


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose a stage's configuration."""
    parser.add_argument("--stage", required=True, metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    parser.add_argument(
        "--preset", default="mini", metavar="NAME", help=f"one of {', '.join(PRESETS)} (default: mini)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file instead of a preset")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings; the last word")


def run(args: argparse.Namespace) -> int:
    """Check everything that needs no torch, then run."""
    config = load_config(args.stage, preset=args.preset, file=args.config, overrides=args.overrides)
    if args.dry_run:
        print(to_yaml(config), end="")
        return 0
    for required in config.required_inputs():
        required.check()
    source = f"config {args.config}" if args.config else f"preset {args.preset}"
    logger.info("%s %s: %s, run folder %s", args.command, args.stage, source, config.run_dir)
    from prefgen.run import run_stage

    result = run_stage(config, verb=args.command, stage=args.stage)
    for name, value in result.metrics.items():
        print(f"{name} = {value:.6g}")
    for name, place in result.places.items():
        print(f"{name}: {place}")
    return result.exit_code
