"""Importers by name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from prefgen.data.sources.base import Opened
from prefgen.data.sources.steps import IMPORTERS
from prefgen.errors import ConfigError


def open_source(importer: str, *, path: Path) -> Opened:
    """Look at a source.

    Args:
        importer: a name of ``IMPORTERS``.
        path: its folder or file.

    Raises:
        ConfigError: no such importer.
        DataError: the source has another layout; the message shows what is expected.
    """
    if importer not in IMPORTERS:
        raise ConfigError(f"unknown importer {importer!r}; importers: {', '.join(IMPORTERS)}")
    module = import_module(f"prefgen.data.sources.{importer.replace('-', '_')}")
    opened: Opened = module.open_source(path)
    return opened
