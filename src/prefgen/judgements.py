"""``judge.csv``: what a person thinks of generated images, written empty beside them, read back filled in."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefgen.errors import DataError

JUDGE_FILE = "judge.csv"
_COLUMNS = ["image", "liked"]
_WORDS = {
    **dict.fromkeys(("yes", "y", "1", "true", "liked", "like"), True),
    **dict.fromkeys(("no", "n", "0", "false", "disliked", "dislike"), False),
}
_LARGEST_FILE = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Judgements:
    """Images of either side, in the order of the file; rows left empty are in neither."""

    liked: tuple[Path, ...]
    disliked: tuple[Path, ...]


def write_judge_file(path: Path, *, images: Sequence[str]) -> None:
    """Write one row an image, its ``liked`` empty.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows([image, ""] for image in images)


def read_judge_file(path: Path) -> Judgements:
    """Read the rows that were filled in with yes or no; the images lie beside the file.

    Raises:
        DataError: no such file, another layout, a word that is neither yes nor no, an image elsewhere or
            twice, or no row filled in.
    """
    sides: dict[bool, list[Path]] = {True: [], False: []}
    seen: set[str] = set()
    for number, row in enumerate(_rows(path), start=2):
        where = f"{path} line {number}"
        if len(row) != len(_COLUMNS):
            raise DataError(f"{where}: expected image,liked, got {len(row)} columns")
        name, word = (cell.strip() for cell in row)
        if not word:
            continue
        if word.lower() not in _WORDS:
            raise DataError(f"{where}: liked must be yes, no or empty, got {word[:40]!r}")
        if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise DataError(f"{where}: image must be the name of a file beside it, got {name[:80]!r}")
        if name in seen:
            raise DataError(f"{where}: {name} was judged before; judge each image once")
        seen.add(name)
        sides[_WORDS[word.lower()]].append(path.parent / name)
    if not seen:
        raise DataError(f"{path}: no image was judged; write yes or no behind the images you have looked at")
    return Judgements(liked=tuple(sides[True]), disliked=tuple(sides[False]))


def _rows(path: Path) -> list[list[str]]:
    """The rows below the header; empty lines are kept as rows of nothing to keep the numbers right."""
    try:
        if path.is_file() and path.stat().st_size > _LARGEST_FILE:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; at most {_LARGEST_FILE:,}")
        # A spreadsheet puts a mark before the first column's name, and may write semicolons.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text in UTF-8; save it as csv (UTF-8)") from None
    lines = text.splitlines()
    first = lines[0] if lines else ""
    header, *rows = csv.reader(lines, delimiter=";" if ";" in first else ",") if lines else [[]]
    if [cell.strip().lower() for cell in header] != _COLUMNS:
        raise DataError(f"{path}: the first line must be image,liked, got {first[:80]!r}")
    return [row or ["", ""] for row in rows]
