"""Contact sheets: every attribute under its name, and whole histories, to be looked at by a person."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prefgen.data.agents.drawings import OPENMOJI
from prefgen.data.agents.painters import paint
from prefgen.data.agents.render import generator_for
from prefgen.data.agents.subjects import Subjects, pick_picture
from prefgen.data.agents.world import ATTRIBUTE_GROUPS, GROUPS, NUM_VALUES
from prefgen.schema import SIDES, UserHistory

_TILE, _GAP, _LINE = 96, 6, 18


def attribute_sheet(*, seed: int = 0, rows: int = 2, subjects: Subjects = OPENMOJI) -> Image.Image:
    """One block a group, one column a value: a plain subject on top, random company below.

    Args:
        seed: of subjects and of the random company.
        rows: pictures a value; the first shows the value on an otherwise plain picture.
        subjects: what is shown.
    """
    concepts = subjects.concepts()
    height = _LINE + rows * (_TILE + _GAP) + _LINE
    sheet = _blank(width=NUM_VALUES * (_TILE + _GAP), height=len(GROUPS) * height + _LINE)
    draw, font = ImageDraw.Draw(sheet), _font()
    for g, group in enumerate(GROUPS):
        top = g * height
        draw.text((_GAP, top + 2), group, fill=(120, 120, 120), font=font)
        for v, name in enumerate(ATTRIBUTE_GROUPS[group]):
            left = v * (_TILE + _GAP)
            for row in range(rows):
                rng = generator_for(seed, "sheet", group, v, row)
                values = (
                    np.array([v % NUM_VALUES, 0, 0, 0, 0]) if row == 0 else rng.integers(0, NUM_VALUES, 5)
                )
                values[g] = v
                drawn = subjects.layers(pick_picture(concepts[int(rng.integers(len(concepts)))], rng=rng))
                picture = paint(drawn, values, size=_TILE, rng=rng)
                sheet.paste(picture, (left, top + _LINE + row * (_TILE + _GAP)))
            draw.text((left, top + height - _LINE - 2), name, fill=0, font=font)
    draw.text((_GAP, len(GROUPS) * height), subjects.attribution, fill=(120, 120, 120), font=font)
    return sheet


def subject_sheet(subjects: Subjects, *, columns: int = 12) -> Image.Image:
    """Every picture of every subject as it is drawn from, those of test agents' subjects underlined.

    Args:
        subjects: the collection.
        columns: pictures in a row.
    """
    shown = [(concept, picture) for concept in subjects.concepts() for picture in concept.pictures]
    step = _TILE + _LINE + _GAP
    rows = -(-len(shown) // columns)
    sheet = _blank(width=columns * (_TILE + _GAP), height=rows * step + _LINE)
    draw, font = ImageDraw.Draw(sheet), _font()
    for place, (concept, picture) in enumerate(shown):
        left, top = place % columns * (_TILE + _GAP), place // columns * step
        colour = subjects.layers(picture).colour.resize((_TILE, _TILE))
        sheet.paste(colour, (left, top), colour)
        draw.text((left, top + _TILE), concept.name, fill=0, font=font)
        if concept.test:
            below = top + _TILE + _LINE - 2
            draw.line((left, below, left + _TILE, below), fill=(160, 20, 20))
    draw.text((_GAP, rows * step), subjects.attribution, fill=(120, 120, 120), font=font)
    return sheet


def history_sheet(
    histories: Sequence[tuple[UserHistory, dict[str, bytes]]],
    *,
    columns: int = 14,
    subjects: Subjects = OPENMOJI,
) -> Image.Image:
    """Liked and disliked pictures of a few users, with what each likes and dislikes in words.

    Args:
        histories: a history and the encoded picture behind each of its paths.
        columns: pictures shown of each side.
        subjects: whose attribution stands below.
    """
    block = 2 * (_LINE + _TILE + _GAP) + _GAP
    sheet = _blank(width=columns * (_TILE + _GAP), height=len(histories) * block + _LINE)
    draw, font = ImageDraw.Draw(sheet), _font()
    for number, (history, images) in enumerate(histories):
        for row, side in enumerate(SIDES):
            top = number * block + row * (_LINE + _TILE + _GAP)
            words = history.liked_attributes if side == "liked" else history.disliked_attributes
            label = f"{history.user_id}  {side} ({len(history.side(side))}): {', '.join(words)}"
            draw.text(
                (_GAP, top + 2), label, fill=(0, 110, 40) if side == "liked" else (160, 20, 20), font=font
            )
            for column, rated in enumerate(history.side(side)[:columns]):
                picture = Image.open(io.BytesIO(images[rated.image])).convert("RGB").resize((_TILE, _TILE))
                sheet.paste(picture, (column * (_TILE + _GAP), top + _LINE))
    draw.text((_GAP, len(histories) * block), subjects.attribution, fill=(120, 120, 120), font=font)
    return sheet


def _blank(*, width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (255, 255, 255))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)
