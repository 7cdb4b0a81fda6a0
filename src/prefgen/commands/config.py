"""``prefgen config --stage S``: every key, its type, its value in the preset, its meaning."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from prefgen.commands.fit import add_stage_options
from prefgen.config import load_config, stage_config_type, stage_keys


def add_parser(subparsers: Any) -> None:
    """Add ``config``."""
    text = "list every key of a stage with its type, default and meaning"
    parser = subparsers.add_parser("config", help=text, description=text.capitalize() + ".")
    add_stage_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the keys, section by section."""
    stage_config_type(args.stage)
    config = load_config(args.stage, preset=args.preset, file=args.config, overrides=args.overrides)
    section = None
    for key in stage_keys(args.stage):
        head = key.name.partition(".")[0] if "." in key.name else ""
        if head != section:
            section = head
            print(f"\n[{section}]" if section else f"[stage {args.stage}]")
        value: Any = config
        for part in key.name.split("."):
            value = getattr(value, part)
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        print(f"  {key.name} = {shown}   ({key.type_name}; default {_default(key.default)})")
        print(textwrap.fill(key.help, width=100, initial_indent="      ", subsequent_indent="      "))
    return 0


def _default(value: object) -> str:
    if value == "???":
        return "none: must be given"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
