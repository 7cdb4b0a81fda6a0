"""argv -> command. Prints a user's mistake as one line and never a traceback; imports nothing heavy."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from prefgen import __version__
from prefgen.commands import COMMANDS
from prefgen.config import stage_keys
from prefgen.config_keys import did_you_mean
from prefgen.errors import ConfigError, PrefgenError, is_disk_full
from prefgen.heap import keep_freed_memory
from prefgen.stages import STAGES

USER_ERROR, OUR_ERROR, INTERRUPTED = 2, 1, 130

DESCRIPTION = """\
Learn one person's visual taste from a few liked and disliked images and make a diffusion model follow it.

The way from histories to images:
  prefgen data agents / data build       simulated users with drawings, packed into shards
  prefgen fit --stage vqa                teach a multi-image language model to answer "would they like this?"
  prefgen fit --stage probe              find the layers that hold a person's taste
  prefgen predict --stage probe          write every user's embeddings
  prefgen fit --stage align              bring them into the diffusion model's text space (MMD)
  prefgen fit --stage inject             let the frozen diffusion model listen to them
  prefgen profile build / generate       one person's profile, and images for it
  prefgen score                          somebody's pictures in the order of one person's taste
  prefgen export                         the adapter for stock diffusers
  prefgen evaluate                       a report on users and subjects nobody has seen
"""
EPILOG = "Settings are key=value, without dashes: prefgen fit --stage align trainer.max_steps=100"


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one line, raised, so that ``main`` prints them."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise ConfigError(f"{message}; see '{self.prog} --help'")


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="prefgen", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"prefgen {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for module in COMMANDS:
        import_module(module).add_parser(subparsers)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command-line words as a namespace; ``key=value`` words may stand anywhere.

    Raises:
        ConfigError: the words make no command.
    """
    parser = build_parser()
    known = list(next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices)
    if argv and not argv[0].startswith("-") and argv[0] not in known:
        hint = did_you_mean(argv[0], among=known)
        raise ConfigError(f"unknown command '{argv[0]}'; commands: {', '.join(known)}.{hint}")
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        raise SystemExit(0 if not argv else USER_ERROR)
    options = _options(parser, args.command)
    for word in rest:
        _check_word(word, args=args, options=options)
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _options(parser: Parser, command: str) -> list[str]:
    """The options of a command, for hints."""
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return list(subparsers.choices[command]._option_string_actions)


def _check_word(word: str, *, args: argparse.Namespace, options: list[str]) -> None:
    """Refuse a word that argparse could not place, unless it may be an override."""
    takes_overrides = hasattr(args, "overrides")
    if not word.startswith("-"):
        if not takes_overrides:
            raise ConfigError(f"unexpected word '{word}'; see 'prefgen {args.command} --help'")
        return
    option, equals, value = word.partition("=")
    hint = did_you_mean(option, among=options)
    name = option.lstrip("-")
    if takes_overrides and ("." in name or _is_key(name, stage=args.stage)):
        raise ConfigError(f"overrides are written without dashes: {name}={value if equals else 'VALUE'}")
    raise ConfigError(f"unknown option '{option}'.{hint or f' See prefgen {args.command} --help'}")


def _is_key(name: str, *, stage: str) -> bool:
    return stage in STAGES and any(key.name == name for key in stage_keys(stage))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when it did its work, 2 for a mistake the user can mend, 1 for one of ours, 130 when interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        code: int = args.run(args)
    except PrefgenError as error:
        return _fail(str(error), code=USER_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted", code=INTERRUPTED)
    except BrokenPipeError:  # e.g. `prefgen config --stage align | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - stays open while Python shuts down
        return 0
    except Exception as error:
        if os.environ.get("PREFGEN_DEBUG"):
            raise
        if is_disk_full(error):
            place = getattr(error, "filename", None) or "while writing"
            return _fail(
                f"the disk is full ({place}); free some space, then run the same command again",
                code=USER_ERROR,
            )
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(f"{text} (PREFGEN_DEBUG=1 shows where)", code=OUR_ERROR)
    return code


def _fail(message: str, *, code: int) -> int:
    print(f"prefgen: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def entry() -> NoReturn:
    """The console script."""
    keep_freed_memory()
    raise SystemExit(main())
