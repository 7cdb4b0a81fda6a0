"""The errors a user may meet: one clear line each, exit code 2.

Everything prefgen raises on bad input descends from :class:`PrefgenError`; the command line prints its
message behind ``prefgen: error: `` and nothing else. Say what is wrong, what was got, what is allowed and how
to mend it. An ``assert`` is for our own mistakes and never for a user's.
"""

from __future__ import annotations

import errno
from pathlib import Path


class PrefgenError(Exception):
    """Anything the user can mend. The message is the whole answer and fits one line."""


class ConfigError(PrefgenError):
    """A configuration key or value, or a command line, that cannot be used."""


class DataError(PrefgenError):
    """A history, shard, image or index that is missing, broken or not what it says it is."""


class CheckpointError(PrefgenError):
    """A checkpoint or stage artefact that is missing, torn, foreign or of another lineage."""


class StepFailedError(PrefgenError):
    """A command of a study's plan ended with an error; its log says more."""


class StoppedBySignalError(PrefgenError):
    """A signal ended the run; a checkpoint was written first.

    Attributes:
        signal_number: which signal came.
        checkpoint: what was written.
    """

    def __init__(self, message: str, *, signal_number: int, checkpoint: Path) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.checkpoint = checkpoint


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that a disk or a quota is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(seen) or "Disk quota exceeded" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
