"""Importer of learn-user-pref: pickled data frames, one row a query with the user's history beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefgen.data.sources.base import Batch, Desk, Judgement, Opened, Payload, Section, Unusable, Verdict
from prefgen.data.sources.files import check_inside, natural_order, source_folder
from prefgen.data.sources.frames import PickledFrame
from prefgen.errors import DataError

COLUMNS = (
    "user_id", "reference_list", "reference_list_bad", "reference_prompt_list", "image0", "image1", "prompt",
    "label0",
)  # fmt: skip
LAYOUT = "*.pkl, pickled pandas frames with the columns " + ", ".join(COLUMNS)


def open_source(path: Path) -> Opened:
    """Look at a folder of learn-user-pref; its parts need no merging.

    Args:
        path: holds ``*.pkl``.

    Raises:
        DataError: no such folder, or no pickles in it.
    """
    root = source_folder(path, layout=LAYOUT)
    files = natural_order([file for file in root.glob("*.pkl") if file.is_file()])
    if not files:
        raise DataError(f"{root}: no .pkl files; expected {LAYOUT}")
    for file in files:
        check_inside(file, root=root)
    notes = (
        "of a row's two candidates the preferred one is liked and the other disliked",
        "rows of one user repeat much of its history; exact-duplicates counts these",
    )
    sections = tuple(_section(file) for file in files)
    return Opened(importer="learn-user-pref", root=root, source="human", sections=sections, notes=notes)


def _section(file: Path) -> Section:
    size = file.stat().st_size

    def read(start: int, desk: Desk) -> Iterator[Batch]:
        frame = PickledFrame(file, spill=desk.scratch / "images.bin")
        missing = [name for name in COLUMNS if name not in frame.columns]
        if missing:
            raise DataError(f"{file}: no column {missing[0]!r}; it has: {', '.join(frame.columns)}")
        for number, row in enumerate(frame.rows(start=start), start=start):
            done = size * (number + 1) // frame.num_rows
            yield _batch(row, position=number + 1, done=done, where=f"{file.name}: row {number}")

    return Section(name=file.name, files=(file,), size=size, read=read)


def _batch(row: dict[str, Any], *, position: int, done: int, where: str) -> Batch:
    user_id = row["user_id"]
    if isinstance(user_id, float):  # pandas turns numbers with a gap into floats
        user_id = int(user_id) if user_id.is_integer() else None
    if not isinstance(user_id, str | int):
        return Batch(position=position, done=done, skipped={"no user_id": 2})
    liked, disliked = _list(row, "reference_list", where), _list(row, "reference_list_bad", where)
    prompts = [str(prompt or "") for prompt in _list(row, "reference_prompt_list", where)]
    items: list[tuple[Verdict, Any, str, str]] = []
    for i in range(max(len(liked), len(disliked))):
        prompt = prompts[i] if i < len(prompts) else ""
        items += [("liked", liked[i], prompt, f"reference_list[{i}]")] if i < len(liked) else []
        items += [("disliked", disliked[i], prompt, f"reference_list_bad[{i}]")] if i < len(disliked) else []
    pair = {1.0: ("liked", "disliked"), 0.0: ("disliked", "liked"), 0.5: ("tie", "tie")}.get(row["label0"])
    skipped = {} if pair else {"unknown label": 2}
    for i, verdict in enumerate(pair or ()):
        items.append((verdict, row[f"image{i}"], str(row["prompt"] or ""), f"image{i}"))  # type: ignore[arg-type]
    judgements = tuple(
        Judgement(
            user_id=str(user_id),
            verdict=verdict,
            image=_image(image),
            prompt=prompt,
            where=f"{where}, {place}",
        )
        for verdict, image, prompt, place in items
    )
    return Batch(position=position, done=done, judgements=judgements, skipped=skipped)


def _list(row: dict[str, Any], name: str, where: str) -> list[Any]:
    value = row[name]
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} must be a list, got {type(value).__name__}")
    return value


def _image(value: Any) -> Payload:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) and data else Unusable("missing")
