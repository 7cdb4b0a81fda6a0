"""The report of a study: ``study.json``, ``study.html``, ``study.md`` and their figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from prefgen.evaluate.blocks import Figure, write_blocks
from prefgen.evaluate.picture_folder import INDEX, PictureFolder, PictureUser, read_picture_folder
from prefgen.evaluate.study_report import study_blocks
from prefgen.study.collect import REPORT, collect
from prefgen.study.further import PICTURES
from prefgen.study.plan import Plan
from prefgen.whole_file import write_json

NUM_SHOWN = 4
TILE = 96
"""Longest side in pixels of a picture in a grid."""

_GAP = 4


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """What was written.

    Attributes:
        study: the content of study.json.
        places: ``json``, ``html``, ``markdown`` -> path.
    """

    study: dict[str, Any]
    places: dict[str, Path]


def write_study(plan: Plan, *, work: Path, out: Path) -> StudyReport:
    """Collect what is finished and write the report into ``out``.

    Raises:
        DataError: nothing of the main table is finished, or runs that do not fit each other.
    """
    study = collect(plan, work=work)
    path = out / "study.json"
    write_json(path, content=study, sort_keys=True, allow_nan=False)
    grids, failures = _galleries(plan, study=study, work=work)
    blocks = study_blocks(study, grids=grids, failures=failures, heat_maps=_heat_maps(plan, work=work))
    places = write_blocks(out, name="study", blocks=blocks, title="prefgen: the study")
    return StudyReport(study=study, places={"json": path, **places})


def _galleries(plan: Plan, *, study: dict[str, Any], work: Path) -> tuple[list[Figure], list[Figure]]:
    """The first users and the worst ones, from the first main run that kept its pictures."""
    for run in plan.runs:
        root = work / "runs" / run.folder / REPORT / PICTURES
        if run.table == "main" and (root / INDEX).is_file():
            folder = read_picture_folder(root)
            first = [user_grid(folder, user=user, name=f"user-{i}.png")
                     for i, user in enumerate(folder.users[:NUM_SHOWN])]  # fmt: skip
            by_id = {user.user_id: user for user in folder.users}
            worst = [
                user_grid(folder, user=by_id[one["user_id"]], name=f"worst-{rank}.png")
                for rank, one in enumerate(study["worst"])
                if one["user_id"] in by_id
            ]
            return first, worst
    return [], []


def user_grid(folder: PictureFolder, *, user: PictureUser, name: str) -> Figure:
    """Liked, disliked, then one row a prompt with a column a condition, as one PNG."""
    names = folder.conditions
    lines = [list(user.liked), list(user.disliked)]
    lines += [[user.pictures[condition][i] for condition in names] for i in range(len(user.prompts))]
    data = _sheet([[folder.root / file for file in line] for line in lines])
    caption = (
        f"{user.user_id}: {user.note}. Rows: liked, disliked, {', '.join(user.prompts)}. Columns of the "
        f"prompts: {', '.join(names)}."
    )
    return Figure(name=name, data=data, caption=caption)


def _sheet(lines: Sequence[Sequence[Path]]) -> bytes:
    columns = max(len(line) for line in lines)
    step = TILE + _GAP
    sheet = Image.new("RGB", (columns * step - _GAP, len(lines) * step - _GAP), "white")
    for row, line in enumerate(lines):
        for column, path in enumerate(line):
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(image, (column * step, row * step))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _heat_maps(plan: Plan, *, work: Path) -> list[Figure]:
    folder = (plan.stages or {}).get("probe")
    if folder is None:
        return []
    tasks = {"inter": "Which user is this?", "intra": "Liked or disliked?"}
    found = {task: work / "runs" / folder / f"{task}_user.png" for task in tasks}
    return [
        Figure(
            name=f"{task}_user.png",
            data=path.read_bytes(),
            caption=f"{tasks[task]} Accuracy of every layer and pooling; the choice is framed.",
        )
        for task, path in found.items()
        if path.is_file()
    ]
