"""What a broken or malicious input is."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "RAN-CODE"
"""A file of this name in the working folder says that an input ran code."""


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """One input.

    Attributes:
        kind: where it comes in.
        name: what is wrong with it.
        make: writes it into a folder and returns the words of a ``prefgen`` command, or a function to call.
    """

    kind: str
    name: str
    make: Callable[[Path], list[str] | Callable[[], object]]


class Evil:
    """Creates :data:`MARK` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {MARK}",)


EVIL = pickle.dumps(Evil())
