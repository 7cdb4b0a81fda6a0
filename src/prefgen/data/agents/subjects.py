"""What can be drawn: concepts and their layers, whichever collection of pictures they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

CANVAS = 128
"""Side of the drawing canvas in pixels; finished images are scaled down from it."""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A thing that can be drawn.

    Attributes:
        pictures: names of its pictures in the collection, at least one.
        name: what we call it, e.g. ``fox``.
        phrase: the name with its article, as prompts use it.
        family: animal, food, vehicle, ..
        test: held out of every history; the base models see it under half of the attributes.
    """

    pictures: tuple[str, ...]
    name: str
    phrase: str
    family: str
    test: bool


@dataclass(frozen=True, kw_only=True)
class Layers:
    """One picture, transparent around the shape; every image ``CANVAS`` x ``CANVAS``.

    Attributes:
        colour: the filled shapes in their original colours (RGBA).
        flat: the same without shading; where nothing is shaded, the same image (RGBA).
        line: coverage of the ink lines (L).
        shape: coverage of the whole drawing, holes between lines filled (L).
    """

    colour: Image.Image
    flat: Image.Image
    line: Image.Image
    shape: Image.Image


class Subjects(Protocol):
    """A collection of concepts. Its instances are small and travel to other processes."""

    @property
    def attribution(self) -> str:
        """Whose pictures these are, and under which licence: one line."""

    def concepts(self) -> tuple[Concept, ...]:
        """All concepts, always in the same order."""

    def layers(self, picture: str) -> Layers:
        """Layers of one of a concept's pictures, kept for the life of the process.

        Raises:
            DataError: the picture cannot be had.
        """

    def check(self) -> None:
        """See that pictures can be had, before anything is written.

        Raises:
            DataError: they cannot; says what to do.
        """


def pick_picture(concept: Concept, *, rng: np.random.Generator) -> str:
    """One of a concept's pictures; where there is only one, nothing is drawn from ``rng``."""
    if len(concept.pictures) == 1:
        return concept.pictures[0]
    return concept.pictures[int(rng.integers(len(concept.pictures)))]


def square_around(shape: Image.Image) -> tuple[int, int, int, int]:
    """Square box around the drawing, with room for a rim, so that every concept is drawn equally large."""
    left, top, right, bottom = shape.getbbox() or (0, 0, *shape.size)
    half = round(max(right - left, bottom - top) * 0.58)
    x, y = (left + right) // 2, (top + bottom) // 2
    return x - half, y - half, x + half, y + half


def cut(image: Image.Image, box: tuple[int, int, int, int], *, size: int = CANVAS) -> Image.Image:
    """The part of an image inside a box, which may reach beyond it, at ``size`` x ``size``."""
    return image.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def filled(shape: Image.Image) -> Image.Image:
    """Close gaps that are enclosed by the shape, so that line drawings have a body too."""
    solid = shape.point(lambda value: 255 if value > 96 else 0).filter(ImageFilter.MaxFilter(3))
    padded = Image.new("L", (CANVAS + 2, CANVAS + 2), 0)
    padded.paste(solid, (1, 1))
    ImageDraw.floodfill(padded, (0, 0), 128)
    holes = padded.point(lambda value: 255 if value == 0 else 0).crop((1, 1, CANVAS + 1, CANVAS + 1))
    return ImageChops.lighter(shape, holes.filter(ImageFilter.MaxFilter(3)))
