"""``prefgen evaluate``: the trained artefacts of a workdir on users and subjects nobody has seen."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prefgen.commands.humans import add_humans_parser
from prefgen.commands.mmd import add_mmd_parser
from prefgen.commands.study import add_study_parser
from prefgen.config import PRESETS
from prefgen.config_keys import list_keys
from prefgen.study.config import EvaluateConfig, load_evaluate_config

logger = logging.getLogger(__name__)

_EPILOG = """\
examples:
  prefgen evaluate workdir=work/demo
  prefgen evaluate workdir=work/demo evaluate.num_users=128 evaluate.user_scale=0.8 out=work/demo/report-128
  prefgen evaluate --keys       every key with its type, default and meaning
  prefgen evaluate --dry-run    the resolved configuration

Reads what the four stages wrote into workdir, draws for the test users under every condition from the same
noise, and writes metrics.json, timing.json and report.html into out (default: workdir/report).
Further evaluations, each with its own --help: {kinds}.
"""

HEADLINES = {
    "own_vs_base": "own against base",
    "own_vs_other": "own against other",
    "own_vs_image_only": "own against image only",
    "own_vs_words": "own against words",
    "vqa_accuracy": "like or dislike",
    "oracle": "  the oracle",
    "history_blind": "  history-blind",
}
"""Entries of metrics.json in the short table, with their names there."""


def add_parser(subparsers: Any) -> None:
    """Add ``evaluate`` and the evaluations behind one more word."""
    text = "measure a workdir on unseen users and write a report"
    parser = subparsers.add_parser("evaluate", help=text, description=text.capitalize() + ".")
    parser.add_argument(
        "--preset", default="mini", metavar="NAME", help=f"one of {', '.join(PRESETS)} (default: mini)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file instead of a preset")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration only")
    parser.add_argument("--keys", action="store_true", help="list every key and do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings; the last word")
    parser.set_defaults(run=run, stage="evaluate")
    kinds = _add_kinds(parser)
    parser.epilog = _EPILOG.format(kinds=", ".join(f"prefgen evaluate {kind}" for kind in kinds) or "none")


def _add_kinds(parser: argparse.ArgumentParser) -> list[str]:
    """Let ``prefgen evaluate WORD ..`` go to a parser of its own.

    argparse knows either free words (key=value) or subcommands, not both, so the first word decides here.
    """
    carrier = type(parser)(prog=parser.prog)
    nested = carrier.add_subparsers(dest="kind", parser_class=type(parser))
    add_mmd_parser(nested)
    add_humans_parser(nested)
    add_study_parser(nested)
    plain = parser.parse_known_args

    def parse(words: Sequence[str] | None = None, namespace: Any = None) -> Any:
        if words and words[0] in nested.choices:
            return carrier.parse_known_args(words, namespace)
        return plain(words, namespace)

    parser.parse_known_args = parse  # type: ignore[method-assign, assignment]
    return list(nested.choices)


def run(args: argparse.Namespace) -> int:
    """Check everything that needs no torch, then evaluate."""
    if args.keys:
        for key in list_keys(EvaluateConfig):
            print(f"{key.name} ({key.type_name}; default {key.default})\n    {key.help}")
        return 0
    config = load_evaluate_config(preset=args.preset, file=args.config, overrides=args.overrides)
    if args.dry_run:
        print(OmegaConf.to_yaml(OmegaConf.create(asdict(config))), end="")
        return 0
    for required in config.required_inputs():
        required.check()
    source = f"config {args.config}" if args.config else f"preset {args.preset}"
    logger.info("evaluate: %s, workdir %s", source, config.workdir)
    from prefgen.study.run import run_study

    result = run_study(config)
    _print_table(result.metrics)
    for name, place in result.places.items():
        print(f"{name}: {place}")
    return 0


def _print_table(metrics: dict[str, Any]) -> None:
    print(f"\n{'':24}  mean   [95 % interval]   ({metrics['num_users']} unseen users)")
    rows = {name: metrics[key] for key, name in HEADLINES.items() if key in metrics}
    fidelity = metrics["prompt_fidelity"]
    rows |= {"prompt fidelity, base": fidelity["base"], "prompt fidelity, own": fidelity["own"]}
    for name, found in rows.items():
        print(f"{name:24}  {found['mean']:.3f}  [{found['low']:.3f}, {found['high']:.3f}]")
    for words in metrics["missing"]:
        print(f"missing: {words}")
    print()
