"""Importer of Pick-a-Pic v1 and v2: parquet files read row by row, whatever the size of their row groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from prefgen.data.sources.base import Batch, Desk, Judgement, Opened, Payload, Section, Unusable, Verdict
from prefgen.data.sources.files import check_inside, natural_order, source_folder
from prefgen.errors import DataError

COLUMNS = ("user_id", "caption", "jpg_0", "jpg_1", "label_0", "label_1")
LAYOUT = "parquet files with the columns " + ", ".join(COLUMNS)
_ROWS, _BUFFER = 32, 1 << 20
_LABELS: dict[tuple[float, float], tuple[Verdict, Verdict]] = {
    (1.0, 0.0): ("liked", "disliked"),
    (0.0, 1.0): ("disliked", "liked"),
    (0.5, 0.5): ("tie", "tie"),
}


def open_source(path: Path) -> Opened:
    """Look at a folder of Pick-a-Pic.

    Args:
        path: holds ``*.parquet``, at any depth.

    Raises:
        DataError: pyarrow is not installed, no parquet files, or a column is missing.
    """
    parquet = _parquet()
    root = source_folder(path, layout=LAYOUT)
    files = natural_order([file for file in root.rglob("*.parquet") if file.is_file()])
    files.sort(key=lambda file: file.parent)
    if not files:
        raise DataError(f"{root}: no parquet files; expected {LAYOUT}")
    for file in files:
        check_inside(file, root=root)
    sections = tuple(_section(file, root=root, parquet=parquet) for file in files)
    notes = ("of a pair the chosen image is liked and the other disliked, for that prompt",)
    return Opened(importer="pickapic", root=root, source="human", sections=sections, unit="row", notes=notes)


def _parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "importing pickapic needs pyarrow; install it with: pip install 'prefgen[import]'"
        ) from None
    return pyarrow.parquet  # type: ignore[no-any-return]


def _section(file: Path, *, root: Path, parquet: ModuleType) -> Section:
    try:
        with parquet.ParquetFile(file) as opened:
            names, rows = set(opened.schema_arrow.names), int(opened.metadata.num_rows)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: no parquet file ({error})") from None
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise DataError(f"{file}: no column {missing[0]!r}; it has: {', '.join(sorted(names))}")
    columns = [*COLUMNS, *sorted({"has_label"} & names)]

    def read(start: int, desk: Desk) -> Iterator[Batch]:
        try:
            for number, row in _rows(file, start=start, columns=columns, parquet=parquet):
                yield _batch(row, number=number, where=f"{file.relative_to(root)}: row {number}")
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: damaged parquet file ({error})") from None

    return Section(name=file.relative_to(root).as_posix(), files=(file,), size=rows, read=read)


def _rows(
    file: Path, *, start: int, columns: list[str], parquet: ModuleType
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows from ``start`` on; whole row groups before it are not read."""
    # With a buffer pyarrow reads pages as they are needed; without, whole column chunks of gigabytes.
    with parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as opened:
        first = 0
        for group in range(opened.metadata.num_row_groups):
            last = first + opened.metadata.row_group(group).num_rows
            if last > start:
                number = first
                for batch in opened.iter_batches(
                    batch_size=_ROWS, row_groups=[group], columns=columns, use_threads=False
                ):
                    skipped = min(max(start - number, 0), batch.num_rows)
                    for row in batch.slice(skipped).to_pylist():
                        yield number + skipped, row
                        skipped += 1
                    number += batch.num_rows
            first = last


def _batch(row: dict[str, Any], *, number: int, where: str) -> Batch:
    place = number + 1
    if row.get("has_label") is False:
        return Batch(position=place, done=place, skipped={"pair without a label": 2})
    if row["user_id"] is None:
        return Batch(position=place, done=place, skipped={"no user_id": 2})
    verdicts = _LABELS.get((row["label_0"], row["label_1"]))
    if verdicts is None:
        return Batch(position=place, done=place, skipped={"unknown label": 2})
    judgements = tuple(
        Judgement(
            user_id=str(row["user_id"]),
            verdict=verdict,
            image=_image(row[f"jpg_{i}"]),
            prompt=row["caption"] or "",
            where=f"{where}, jpg_{i}",
        )
        for i, verdict in enumerate(verdicts)
    )
    return Batch(position=place, done=place, judgements=judgements)


def _image(value: Any) -> Payload:
    """Plain bytes, or the ``{bytes, path}`` that the hub's image columns hold."""
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) and data else Unusable("missing")
