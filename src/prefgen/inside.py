"""Whether a file of a stranger stays in the folder it came in."""

from __future__ import annotations

import os
from pathlib import Path


def is_inside(path: Path, *, root: Path) -> bool:
    """Whether ``path`` lies in ``root`` once links are followed; it need not exist.

    Links in a circle count as inside: opening them fails with an OSError, as for any missing file. Up to
    Python 3.12 ``Path.resolve`` raises a RuntimeError for them, which no reader of files expects.

    Raises:
        ValueError: a NUL byte in the path.
    """
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
