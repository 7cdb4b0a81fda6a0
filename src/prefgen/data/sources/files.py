"""Files of strangers: nothing outside the source folder, no links, parts in order, json lists as a stream."""

from __future__ import annotations

import io
import json
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from prefgen.data.images import MAX_IMAGE_BYTES
from prefgen.data.sources.base import Unusable
from prefgen.errors import DataError
from prefgen.inside import is_inside

MAX_RECORD_CHARS = 16 << 20
"""Most characters of one json record."""

_CHUNK = 1 << 20


def source_folder(path: Path, *, layout: str) -> Path:
    """A folder given by the user.

    Raises:
        DataError: it is none; the message shows the layout expected.
    """
    if not path.is_dir():
        raise DataError(f"no folder at {path}; expected {layout}")
    return path


def check_relative(name: str, *, where: str) -> None:
    """Refuse a name that could lead out of its folder.

    Raises:
        DataError: absolute, with ``..``, a drive, a backslash, a NUL byte, a pipe or a URL.
    """
    path = PurePosixPath(name)
    bad = ".." in path.parts or path.is_absolute() or PureWindowsPath(name).drive or "\\" in name
    if not name or bad or "\x00" in name or name.startswith("pipe:") or "://" in name:
        raise DataError(
            f"{where}: path {name[:120]!r} is refused; paths must be relative and stay inside the source"
        )


def check_inside(path: Path, *, root: Path) -> None:
    """Refuse a file or folder that a link leads out of the source.

    Raises:
        DataError: it does.
    """
    if not is_inside(path, root=root):
        raise DataError(f"{path} leads outside {root} through a link, which is refused")


def read_image(name: str, *, root: Path, where: str) -> bytes | Unusable:
    """Bytes of an image file.

    Args:
        name: path relative to ``root``.
        root: folder of the source; nothing outside it is read.
        where: for the message.

    Raises:
        DataError: the path leads outside, by its text or through a link.
    """
    check_relative(name, where=where)
    file = root / name
    try:
        if not is_inside(file, root=root):
            raise DataError(f"{where}: {name[:120]!r} leads outside {root} through a link, which is refused")
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a fifo would block forever
            return Unusable("not a regular file")
        return Unusable("too large") if status.st_size > MAX_IMAGE_BYTES else file.read_bytes()
    except OSError:
        return Unusable("missing")


def natural_order(paths: Sequence[Path]) -> list[Path]:
    """Sorted so that ``part-2`` comes before ``part-10``."""

    def key(path: Path) -> list[tuple[int, str]]:
        return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", path.name) if p]

    return sorted(paths, key=key)


class JoinedFile(io.RawIOBase):
    """Several files read as one, as ``cat`` would: seekable, one open at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self._paths = tuple(paths)
        self._sizes = tuple(path.stat().st_size for path in paths)
        self.size = sum(self._sizes)
        self._place = 0
        self._open: tuple[int, io.BufferedReader] | None = None

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Byte position from the start of the first file."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; a position past the end reads nothing."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Bytes up to the end of the file that the position lies in."""
        start = self._place
        for number, size in enumerate(self._sizes):
            if start < size:
                file = self._file(number)
                file.seek(start)
                count = file.readinto(buffer)
                self._place += count
                return count
            start -= size
        return 0

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None
        super().close()

    def _file(self, number: int) -> io.BufferedReader:
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
            self._open = (number, self._paths[number].open("rb"))
        return self._open[1]


def json_list(path: Path) -> Iterator[tuple[int, Any, int]]:
    """Items of a json list, or of one value a line, one at a time.

    Yields:
        The item's number from 0, the item, and the characters read so far (close to the bytes).

    Raises:
        DataError: missing, not utf-8, bad json, or an item over 16 Mi characters.
    """
    decoder = json.JSONDecoder()
    number, seen, text, ended, bracket = 0, 0, "", False, None
    try:
        with path.open(encoding="utf-8") as file:
            while True:
                text = text.lstrip(", \t\r\n")
                if bracket is None and text:
                    bracket = text[0] == "["
                    text = text[bracket:].lstrip()
                item, stop = _next_item(decoder, text)
                if stop and (stop < len(text) or ended):
                    yield number, item, seen - len(text) + stop
                    number, text = number + 1, text[stop:]
                    continue
                if text.startswith("]") or (ended and not text and not bracket):
                    return
                if ended:
                    raise DataError(f"{path}: item {number} is not whole json; the file may be cut off")
                if len(text) > MAX_RECORD_CHARS:
                    raise DataError(
                        f"{path}: item {number} is no json or over {MAX_RECORD_CHARS:,} characters"
                    )
                # Doubling keeps the number of attempts at one long item logarithmic.
                chunk = file.read(max(_CHUNK, len(text)))
                ended, seen, text = not chunk, seen + len(chunk), text + chunk
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not utf-8 text") from None
    except RecursionError:
        raise DataError(f"{path}: item {number} is nested too deeply") from None


def _next_item(decoder: json.JSONDecoder, text: str) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text) if text else (None, 0)
    except ValueError:
        return None, 0


def text_field(record: Any, *, name: str, where: str) -> str:
    """A text or a number of a record, as text.

    Raises:
        DataError: not an object, or the field is missing or of another type.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: {name} must be text, got {type(value).__name__}")
    return str(value)


def text_list(record: Any, *, name: str, where: str) -> list[str]:
    """A list of text of a record; one text counts as a list of one.

    Raises:
        DataError: not an object, or the field is missing or of another type.
    """
    value = record.get(name) if isinstance(record, dict) else None
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where}: {name} must be a list of text")
    return value
