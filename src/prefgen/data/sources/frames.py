"""A pickled pandas frame as rows, without pandas: inert classes that remember what the pickle gave them.

Two layouts are known: block tuples since pandas 1.3 (``_unpickle_block``) and the ``0.14.1`` state before.
Columns have to be numbers or python objects; pandas' own string and arrow columns are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prefgen.data.sources.pickles import SpilledBytes, Stateful, load_spilling
from prefgen.errors import DataError

_NUMBER = re.compile(r"[?biufSU]\d{0,3}")


class _Inert(Stateful):
    """Stands for a class: keeps arguments and state, does nothing."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Any:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Frame(_Inert):
    pass


class _Manager(_Inert):
    pass


class _Index(_Inert):
    pass


class _DType(_Inert):
    pass


class _Array(_Inert):
    """A numpy array: ``state`` is (version, shape, dtype, fortran order, list of objects or raw bytes)."""


def _reconstruct(*_: Any) -> _Array:
    made: _Array = _Array()
    return made


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    made: _Array = _Array()
    made.state = (1, shape, dtype, order == "F", data)
    return made


def _block(values: Any, placement: Any, ndim: Any) -> tuple[Any, Any]:
    return values, placement


def _new_index(_: Any, state: Any) -> _Index:
    made: _Index = _Index()
    made.state = state
    return made


def _scalar(dtype: Any, data: Any) -> Any:
    """A single numpy number in a column of objects."""
    return _numbers(dtype, data).item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    # How bytes were written up to protocol 2.
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("unexpected text encoding")
    return text.encode("latin1")


CLASSES: dict[tuple[str, str], Any] = {
    ("builtins", "slice"): slice,
    ("__builtin__", "slice"): slice,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("pandas", "DataFrame"): _Frame,
    ("pandas", "Index"): _Index,
    ("pandas", "RangeIndex"): _Index,
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas.core.internals.managers", "BlockManager"): _Manager,
    ("pandas.core.internals", "BlockManager"): _Manager,
    ("pandas._libs.internals", "BlockManager"): _Manager,
    ("pandas._libs.internals", "_unpickle_block"): _block,
    ("pandas.core.indexes.base", "_new_Index"): _new_index,
    ("pandas.core.indexes.base", "Index"): _Index,
    ("pandas.core.indexes.range", "RangeIndex"): _Index,
    ("pandas.core.indexes.numeric", "Int64Index"): _Index,
}
for _core in ("numpy.core", "numpy._core"):
    CLASSES[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    CLASSES[f"{_core}.multiarray", "scalar"] = _scalar
    CLASSES[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class PickledFrame:
    """Rows of a pickled frame; images stay on disk until their row is asked for.

    Attributes:
        columns: names, in the frame's order.
        num_rows: how many.
    """

    def __init__(self, path: Path, *, spill: Path) -> None:
        frame = load_spilling(path, classes=CLASSES, spill=spill)
        try:
            self._take(frame)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            text = f"{type(error).__name__}: {error}"
            raise DataError(f"{path}: no pandas frame of a known layout ({text[:160]})") from None

    def _take(self, frame: Any) -> None:
        if not isinstance(frame, _Frame):
            raise TypeError(f"it holds a {type(frame).__name__}")
        manager = frame.state["_mgr"] if "_mgr" in frame.state else frame.state["_data"]
        if manager.args:
            blocks, axes = manager.args[0], manager.args[1]
        else:
            state = manager.state[3]["0.14.1"]
            blocks = [(block["values"], block["mgr_locs"]) for block in state["blocks"]]
            axes = state["axes"]
        self.columns = tuple(str(name) for name in _index_values(axes[0]))
        columns: list[Sequence[Any]] = [() for _ in self.columns]
        for values, placement in blocks:
            for place, column in zip(_places(placement), _columns(values), strict=True):
                columns[place] = column
        self._by_name = dict(zip(self.columns, columns, strict=True))
        self.num_rows = len(columns[0]) if columns else 0
        if any(len(column) != self.num_rows for column in columns):
            raise ValueError("columns of different lengths")

    def rows(self, *, start: int) -> Iterator[dict[str, Any]]:
        """Rows from ``start`` on, with byte strings read back and arrays of objects as lists."""
        for number in range(start, self.num_rows):
            yield {name: _resolve(column[number]) for name, column in self._by_name.items()}


def _index_values(index: Any) -> list[Any]:
    data = index.state["data"]
    return list(_columns(data)[0]) if isinstance(data, _Array) else list(data)


def _places(placement: Any) -> Sequence[int]:
    if isinstance(placement, slice):
        return range(placement.start or 0, placement.stop, placement.step or 1)
    return [int(place) for place in _columns(placement)[0]]


def _columns(array: Any) -> list[Sequence[Any]]:
    """Rows of a two-dimensional array, or the only one of a flat array: pandas keeps columns as rows."""
    _, shape, dtype, fortran, data = array.state
    width = shape[-1]
    height = shape[0] if len(shape) == 2 else 1
    code = str(dtype.args[0])
    if code.startswith("O"):
        flat: Any = data
        if len(flat) != width * height:
            raise ValueError("array of the wrong length")
        return [
            flat[row::height] if fortran else flat[row * width : (row + 1) * width] for row in range(height)
        ]
    numbers = _numbers(dtype, data).reshape(shape, order="F" if fortran else "C")
    return [row.tolist() for row in (numbers if len(shape) == 2 else [numbers])]


def _numbers(dtype: Any, data: Any) -> npt.NDArray[Any]:
    """Raw bytes as a flat array of numbers or fixed text."""
    code = str(dtype.args[0])
    if not _NUMBER.fullmatch(code):
        raise ValueError(f"column of the unknown type {code!r}")
    big = dtype.state is not None and dtype.state[1] == ">"
    raw = data.read() if isinstance(data, SpilledBytes) else bytes(data)
    return np.frombuffer(raw, dtype=np.dtype(code).newbyteorder(">" if big else "<"))


def _resolve(value: Any) -> Any:
    if isinstance(value, SpilledBytes):
        return value.read()
    if isinstance(value, _Array):
        return [_resolve(item) for column in _columns(value) for item in column]
    if isinstance(value, list | tuple):
        return [_resolve(item) for item in value]
    return value
