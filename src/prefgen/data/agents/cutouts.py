"""A folder of cut-out pictures as a collection of concepts: photos and cartoons instead of layered drawings.

``prefgen data stamps`` writes such a folder: ``subjects.json`` and the pictures, RGBA and square. A photo has
no ink layer; its layers are worked out (all numbers ours): lightness stretched within the shape, so that a
palette's whole ramp is used; a version flattened to four tones; lines where it is darker than its
surroundings, and along the rim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from prefgen.data.agents.subjects import CANVAS, Concept, Layers, filled
from prefgen.data.images import decode_cutout
from prefgen.data.sources.base import Unusable
from prefgen.data.sources.files import read_image
from prefgen.errors import DataError

SUBJECTS_FILE = "subjects.json"
SUBJECTS_VERSION = 1

TONES = 4
"""Tones of the flattened version."""

LINE_SHARE = 12
"""Percent of a shape's pixels that may be ink lines inside it."""

_FAINTEST_LINE = 4.0
"""A pixel less darker than its surroundings than this, of 255, is no line however plain the picture is."""

_STRETCH = (2, 98)
_NEAR, _FAR = 1.2, 2.6
"""Radii of the two blurs whose difference finds lines."""


@dataclass(frozen=True)
class SubjectFolder:
    """A folder with ``subjects.json``, as :class:`~prefgen.data.agents.subjects.Subjects`.

    Attributes:
        folder: where it lies.
    """

    folder: Path

    @property
    def attribution(self) -> str:
        """Whose pictures these are, and under which licence."""
        return str(_content(self.folder)["attribution"])

    def concepts(self) -> tuple[Concept, ...]:
        """All concepts, in the file's order.

        Raises:
            DataError: no such file, another version, or a record that is none.
        """
        return _concepts(self.folder)

    def layers(self, picture: str) -> Layers:
        """Layers of one picture.

        Raises:
            DataError: missing, outside the folder, or not a picture.
        """
        return _layers(self.folder, picture)

    def check(self) -> None:
        """See that the file can be read and every picture is there.

        Raises:
            DataError: not so.
        """
        for concept in self.concepts():
            for picture in concept.pictures:
                _read(self.folder, picture)


@cache
def _content(folder: Path) -> dict[str, Any]:
    path = folder / SUBJECTS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); 'prefgen data stamps PATH --out {folder}' writes it"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not json ({error})") from None
    if not isinstance(content, dict) or content.get("version") != SUBJECTS_VERSION:
        raise DataError(f"{path}: expected version {SUBJECTS_VERSION}; make it anew with this prefgen")
    return content


@cache
def _concepts(folder: Path) -> tuple[Concept, ...]:
    try:
        concepts = tuple(
            Concept(
                pictures=tuple(str(picture["file"]) for picture in record["pictures"]),
                name=str(record["name"]),
                phrase=str(record["phrase"]),
                family=str(record["family"]),
                test=bool(record["test"]),
            )
            for record in _content(folder)["subjects"]
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / SUBJECTS_FILE}: a subject is not whole ({error!r})") from None
    if not concepts or not all(concept.pictures for concept in concepts):
        raise DataError(f"{folder / SUBJECTS_FILE}: expected subjects with a picture each")
    return concepts


def _read(folder: Path, picture: str) -> bytes:
    data = read_image(picture, root=folder, where=str(folder / SUBJECTS_FILE))
    if isinstance(data, Unusable):
        raise DataError(f"{folder / picture}: {data.reason}; run 'prefgen data stamps' into another folder")
    return data


@cache
def _layers(folder: Path, picture: str) -> Layers:
    return cutout_layers(decode_cutout(_read(folder, picture), where=str(folder / picture)))


def cutout_layers(cutout: Image.Image) -> Layers:
    """Layers of a square RGBA picture that is transparent around its subject.

    Raises:
        DataError: nothing of it is opaque.
    """
    image = cutout.resize((CANVAS, CANVAS), Image.Resampling.LANCZOS)
    alpha = image.getchannel("A")
    inside = np.asarray(alpha) > 128
    if not inside.any():
        raise DataError("a cut-out picture is transparent everywhere")
    light = np.asarray(image.convert("L"), dtype=np.float64)
    low, high = np.percentile(light[inside], _STRETCH)
    tone = Image.fromarray((np.clip((light - low) / max(high - low, 1.0), 0, 1) * 255).astype(np.uint8))
    step = 255 / (TONES - 1)
    table = [round(round(value / step) * step) for value in range(256)]
    flat = tone.filter(ImageFilter.MedianFilter(5)).point(table).filter(ImageFilter.ModeFilter(5))
    return Layers(
        colour=Image.merge("RGBA", (tone, tone, tone, alpha)),
        flat=Image.merge("RGBA", (flat, flat, flat, alpha)),
        line=_lines(tone, alpha=alpha, inside=inside),
        shape=filled(alpha),
    )


def _lines(tone: Image.Image, *, alpha: Image.Image, inside: np.ndarray) -> Image.Image:
    """Coverage of lines: what is darker than its surroundings, and the rim of the shape."""
    shown = Image.composite(tone, Image.new("L", tone.size, 255), alpha)
    near, far = (
        np.asarray(shown.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)
        for radius in (_NEAR, _FAR)
    )
    depth = np.where(inside, far - near, 0.0)
    enough = max(float(np.percentile(depth[inside], 100 - LINE_SHARE)), _FAINTEST_LINE)
    ink = np.clip((depth / enough - 0.6) / 0.8, 0, 1)
    rim = ImageChops.subtract(
        alpha.filter(ImageFilter.GaussianBlur(0.6)), alpha.filter(ImageFilter.MinFilter(5))
    )
    lines = ImageChops.lighter(Image.fromarray((ink * 255).astype(np.uint8)), rim)
    return ImageChops.darker(lines, alpha)
