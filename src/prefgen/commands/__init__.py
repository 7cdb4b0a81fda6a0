"""The commands, one module each.

A command module imports without torch and offers ``add_parser(subparsers) -> None``, which sets
``parser.set_defaults(run=run)``, and ``run(args) -> int``. Heavy imports happen inside ``run``; results go to
stdout with ``print``; a user's mistake is raised as a PrefgenError.
"""

COMMANDS = (
    "prefgen.commands.data",
    "prefgen.commands.fit",
    "prefgen.commands.profile",
    "prefgen.commands.generate",
    "prefgen.commands.score",
    "prefgen.commands.export",
    "prefgen.commands.evaluate",
    "prefgen.commands.config",
    "prefgen.commands.doctor",
)
"""Command modules in the order of ``prefgen --help``."""
