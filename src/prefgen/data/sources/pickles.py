"""Pickles of strangers, read without running anything of theirs.

A pickle is a program. Here it can call nothing (:func:`load_plain`), or nothing but the inert classes of
``frames``: a pandas frame is taken apart without pandas, and no code of pandas, numpy or the source runs.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from prefgen.data.images import MAX_IMAGE_BYTES
from prefgen.errors import DataError

MAX_PICKLE_BYTES = 4 << 30
SPILL_BYTES = 4096
"""Longer byte strings of a frame go to a file as they are met."""

_BROKEN = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
    AssertionError, OverflowError, MemoryError, RecursionError, struct.error,
)  # fmt: skip


class _RefusedError(Exception):
    """The pickle asked for a class or a function."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _RefusedError("a persistent object")


def load_plain(path: Path) -> Any:
    """A pickle of dicts, lists, tuples, sets, text, bytes and numbers; anything else is refused.

    Raises:
        DataError: it asks for a class or function, is over 4 GiB, or is damaged.
    """
    return _load(path, lambda file: _Plain(file).load(), allowed="plain containers and text are")


class SpilledBytes:
    """Bytes that lie in a file."""

    __slots__ = ("_path", "_size", "_start")

    def __init__(self, path: Path, *, start: int, size: int) -> None:
        self._path, self._start, self._size = path, start, size

    def read(self) -> bytes:
        """The bytes."""
        with self._path.open("rb") as file:
            file.seek(self._start)
            return file.read(self._size)


class Stateful:
    """What a pickle may give a state to; of everything else it could otherwise change attributes."""

    def __setstate__(self, state: Any) -> None:
        raise NotImplementedError


class _Spilling(pickle._Unpickler):
    """Python's own unpickler in Python, whose opcodes can be replaced: images never gather in memory."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, *, classes: dict[tuple[str, str], Any], spill: Path) -> None:
        super().__init__(file)
        self._classes = classes
        self._path = spill
        self._spill = spill.open("wb")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._classes:
            raise _RefusedError(f"{module}.{name}")
        return self._classes[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _RefusedError("a persistent object")

    def get_extension(self, code: int) -> NoReturn:
        raise _RefusedError("an extension code")

    def close(self) -> None:
        self._spill.close()

    def build(self) -> None:
        stack = self.stack  # type: ignore[attr-defined]
        state = stack.pop()
        if not isinstance(stack[-1], Stateful):
            raise _RefusedError(f"setting attributes of a {type(stack[-1]).__name__}")
        stack[-1].__setstate__(state)

    def take_bytes(self, size: int) -> None:
        if size > MAX_IMAGE_BYTES:
            raise pickle.UnpicklingError(f"{size:,} bytes in one string")
        data = self.read(size)  # type: ignore[attr-defined]
        if size > SPILL_BYTES:
            start = self._spill.tell()
            self._spill.write(data)
            data = SpilledBytes(self._path, start=start, size=size)
        self.append(data)  # type: ignore[attr-defined]


def _take(width: int) -> Callable[[Any], None]:
    def load(self: _Spilling) -> None:
        self.take_bytes(int.from_bytes(self.read(width), "little"))  # type: ignore[attr-defined]

    return load


cast(Any, _Spilling.dispatch).update(
    {
        pickle.SHORT_BINBYTES[0]: _take(1),
        pickle.BINBYTES[0]: _take(4),
        pickle.BINBYTES8[0]: _take(8),
        pickle.BYTEARRAY8[0]: _take(8),
        pickle.BUILD[0]: _Spilling.build,
    }
)


def load_spilling(path: Path, *, classes: dict[tuple[str, str], Any], spill: Path) -> Any:
    """A pickle that may ask for the given classes only, with its long byte strings left on disk.

    Args:
        path: the pickle.
        classes: what stands for each (module, name); nothing of the real modules is imported.
        spill: file for byte strings over ``SPILL_BYTES``, which become :class:`SpilledBytes`.

    Raises:
        DataError: it asks for anything else, or is damaged.
    """

    def load(file: BinaryIO) -> Any:
        unpickler = _Spilling(file, classes=classes, spill=spill)
        try:
            return unpickler.load()
        finally:
            unpickler.close()

    return _load(path, load, allowed="a pandas frame of numbers, text and bytes is", max_bytes=None)


def _load(
    path: Path, load: Callable[[BinaryIO], Any], *, allowed: str, max_bytes: int | None = MAX_PICKLE_BYTES
) -> Any:
    try:
        with path.open("rb") as file:
            if max_bytes is not None and path.stat().st_size > max_bytes:
                raise DataError(f"{path}: pickle of over {max_bytes:,} bytes is refused")
            return load(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except _RefusedError as error:
        raise DataError(
            f"{path}: the pickle asks for {error}, which could run code and is refused; only {allowed} read"
        ) from None
    except _BROKEN as error:
        raise DataError(
            f"{path}: damaged or foreign pickle ({type(error).__name__}: {str(error)[:120]})"
        ) from None
