"""Importer of tables: CSV or JSONL with the columns user_id, image, liked and perhaps prompt."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefgen.data.sources.base import Batch, Desk, Judgement, Opened, Section, Verdict
from prefgen.data.sources.files import json_list, read_image, text_field
from prefgen.errors import DataError

VERDICTS: dict[str, Verdict] = {
    **dict.fromkeys(("1", "yes", "y", "true", "like", "liked"), "liked"),
    **dict.fromkeys(("0", "no", "n", "false", "dislike", "disliked"), "disliked"),
    "tie": "tie",
}
COLUMNS = ("user_id", "image", "liked")


def open_source(path: Path) -> Opened:
    """Look at a table.

    Args:
        path: ``.csv``, or ``.jsonl`` (or ``.json`` with a list); image paths are relative to it.

    Raises:
        DataError: no such file, another ending, or a column is missing.
    """
    if not path.is_file() or path.suffix not in (".csv", ".jsonl", ".json"):
        raise DataError(f"{path} is no .csv, .jsonl or .json file; expected a table: {', '.join(COLUMNS)}")
    if path.suffix == ".csv":
        next(_csv_rows(path), None)  # complains about columns now, before anything is written

    def read(start: int, desk: Desk) -> Iterator[Batch]:
        rows = _csv_rows(path) if path.suffix == ".csv" else json_list(path)
        for number, row, done in rows:
            if number >= start:
                judgement = _judgement(row, root=path.parent, where=f"{path}: row {number + 1}")
                yield Batch(position=number + 1, done=done, judgements=(judgement,))

    section = Section(name=path.name, files=(path,), size=path.stat().st_size, read=read)
    return Opened(importer="table", root=path.parent, source="human", sections=(section,))


def _judgement(row: Any, *, root: Path, where: str) -> Judgement:
    user_id = text_field(row, name="user_id", where=where)
    image = text_field(row, name="image", where=where)
    liked = str(row.get("liked")).strip().lower()
    if liked not in VERDICTS:
        raise DataError(f"{where}: liked is {row.get('liked')!r}; expected one of {', '.join(VERDICTS)}")
    return Judgement(
        user_id=user_id,
        verdict=VERDICTS[liked],
        image=read_image(image, root=root, where=where),
        prompt=str(row.get("prompt") or ""),
        where=where,
    )


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str | None], int]]:
    done = 0

    def lines() -> Iterator[str]:
        nonlocal done
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line in file:
                done += len(line)
                yield line

    try:
        rows = csv.DictReader(lines())
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r}; it has: {', '.join(rows.fieldnames or ())}")
        for number, row in enumerate(rows):
            yield number, row, done
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a csv file ({error})") from None
