"""Keeps Lightning's noise from the user, and turns what it and worker processes raise into one line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from prefgen.errors import ConfigError, PrefgenError

_HARMLESS = (
    "Found .* module.* in eval mode at the start of training",  # the frozen parts, on purpose
    "Checkpoint directory .* exists and is not empty",  # that is how a run goes on
    "The `srun` command is available on your system but is not used",  # a laptop may have slurm installed
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without the banners and the warnings that say nothing to a user of prefgen."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", message=message)
        for name in names:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise Lightning's complaints and errors of worker processes as ours, in one line."""
    try:
        yield
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from None
    except PrefgenError as error:
        text = str(error).rstrip()
        if "Original Traceback" not in text:
            raise
        # torch hands on a worker's error with its whole traceback as the message
        raise type(error)(text.splitlines()[-1].partition(": ")[2]) from None
