"""Loading with transformers without its progress bars and hints, which a user can do nothing with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import transformers.utils.logging as transformers_logging


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Errors only, and no bars, inside; as it was afterwards."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
