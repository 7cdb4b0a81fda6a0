"""Importer of plain folders: ``USER/liked``, ``USER/disliked``, or a single ``liked``, ``disliked``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from prefgen.data.sources.base import Batch, Desk, Judgement, Opened, Section
from prefgen.data.sources.files import check_inside, read_image, source_folder
from prefgen.errors import DataError
from prefgen.schema import SIDES, Side

LAYOUT = "USER/liked/ and USER/disliked/ with images, or liked/ and disliked/"
PROMPTS_NAME = "prompts.csv"


def open_source(path: Path) -> Opened:
    """Look at a folder.

    Args:
        path: holds a folder per user, or one user's ``liked`` and ``disliked``; the user is then named
            after the folder.

    Raises:
        DataError: no such folder, or nobody in it.
    """
    root = source_folder(path, layout=LAYOUT)
    if any((root / side).is_dir() for side in SIDES):
        users = [""]
    else:
        users = sorted(
            folder.name for folder in root.iterdir() if any((folder / side).is_dir() for side in SIDES)
        )
    if not users:
        raise DataError(f"{root}: nobody's images are here; expected {LAYOUT}")
    csvs = [root / user / PROMPTS_NAME for user in dict.fromkeys(("", *users))]
    total = sum(1 for _ in _listed(root, users=users))

    def read(start: int, desk: Desk) -> Iterator[Batch]:
        return _read(root, users=users, start=start)

    section = Section(
        name="folders", files=tuple(file for file in csvs if file.is_file()), size=total, read=read
    )
    return Opened(importer="folder", root=root, source="human", sections=(section,), unit="image")


def _listed(root: Path, *, users: list[str]) -> Iterator[tuple[str, Side, str]]:
    """User, side and path of every image file; the listing of one folder at a time is in memory."""
    for user in users:
        for side in SIDES:
            folder = root / user / side
            if not folder.is_dir():
                continue
            check_inside(folder, root=root)
            for name in sorted(entry.name for entry in folder.iterdir() if not entry.is_dir()):
                # Systems leave hidden files such as .DS_Store in every folder; they were never images.
                if not name.startswith("."):
                    yield user, side, f"{user}/{side}/{name}" if user else f"{side}/{name}"


def _read(root: Path, *, users: list[str], start: int) -> Iterator[Batch]:
    shared = _prompts(root / PROMPTS_NAME, root=root)
    own: tuple[str | None, dict[str, str]] = (None, {})
    for number, (user, side, path) in enumerate(_listed(root, users=users)):
        if number < start:
            continue
        if own[0] != user:
            own = (user, _prompts(root / user / PROMPTS_NAME, root=root) if user else shared)
        inside = path.removeprefix(f"{user}/")
        judgement = Judgement(
            user_id=user or root.resolve().name,
            verdict=side,
            image=read_image(path, root=root, where=str(root / path)),
            prompt=own[1].get(inside) or shared.get(path) or own[1].get(Path(path).name, ""),
            where=str(root / path),
        )
        yield Batch(position=number + 1, done=number + 1, judgements=(judgement,))


def _prompts(file: Path, *, root: Path) -> dict[str, str]:
    """Prompts by image path relative to the csv, or by bare file name."""
    if not file.is_file():
        return {}
    check_inside(file, root=root)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            if not {"image", "prompt"} <= set(rows.fieldnames or ()):
                raise DataError(f"{file}: expected the columns image,prompt, got {rows.fieldnames}")
            return {row["image"] or "": row["prompt"] or "" for row in rows}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a csv file ({error})") from None
