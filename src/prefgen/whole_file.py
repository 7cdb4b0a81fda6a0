"""Files that appear whole or not at all: written beside their place, then renamed into it.

A process that is killed, or a disk that fills up, while a file is written in place leaves half of it under
the name that readers trust, and has destroyed the one that was there before.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A name beside ``path`` to write to; it becomes ``path`` at the end of the block.

    Where the block or the renaming fails, what was written is taken away again and ``path`` is as before.
    What must survive a power cut is for the block to fsync.

    Args:
        path: the file; its folder is made.
        shared: several processes may write it at once. Each then has a name of its own, or they would write
            into one another's file. Otherwise the name is always the same, so that what a killed process has
            left is overwritten by the next one and never piles up.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        part.replace(path)
    except BaseException:
        # A folder that can no longer be written to must not hide the error that brought us here.
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_text(path: Path, *, text: str, shared: bool = False) -> None:
    """A whole text file, in UTF-8."""
    with whole_file(path, shared=shared) as part:
        part.write_text(text, encoding="utf-8")


def write_json(
    path: Path,
    *,
    content: Any,
    indent: int | None = 1,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
    allow_nan: bool = True,
    shared: bool = False,
) -> None:
    """A whole json file that ends with a line break; what each name means, ``json.dumps`` says."""
    text = json.dumps(
        content, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii, allow_nan=allow_nan
    )
    write_text(path, text=text + "\n", shared=shared)
