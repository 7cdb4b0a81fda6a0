"""``prefgen doctor``: what is installed, what will be used, what is missing."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add ``doctor``."""
    text = "say what is installed, which device, precision and MMD backend will be used, and what is missing"
    parser = subparsers.add_parser("doctor", help=text, description=text.capitalize() + ".")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    del args
    return 0
