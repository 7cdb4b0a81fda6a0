"""A report as blocks, rendered twice: as one HTML file and as Markdown with files beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefgen.evaluate.page import page, table, text
from prefgen.whole_file import write_text


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A heading; level 1 is the report's own."""

    words: str
    level: int = 2


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Plain words."""

    words: str


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of plain words; all but the first column hold figures."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing or picture with the name of its file.

    Attributes:
        name: file name, ending in .svg or .png.
        data: its bytes.
        caption: words below it.
    """

    name: str
    data: bytes
    caption: str


Block = Heading | Paragraph | Grid | Figure


def to_html(blocks: Sequence[Block], *, title: str) -> str:
    """One self-contained file."""
    return page(title, body="".join(_html(block) for block in blocks))


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{text(block.words)}</h{block.level}>\n"
    if isinstance(block, Paragraph):
        return f"<p>{text(block.words)}</p>\n"
    if isinstance(block, Grid):
        rows = [[text(cell) for cell in row] for row in block.rows]
        return table(block.head, rows=rows, numeric=range(1, len(block.head)))
    kind = "svg+xml" if block.name.endswith(".svg") else "png"
    uri = f"data:image/{kind};base64,{base64.b64encode(block.data).decode('ascii')}"
    words = text(block.caption)
    return f'<figure><img class="strip" alt="{words}" src="{uri}"><figcaption>{words}</figcaption></figure>\n'


def to_markdown(blocks: Sequence[Block], *, folder: str) -> str:
    """The same in Markdown; figures are referred to as files of ``folder``."""
    return "\n".join(_markdown(block, folder=folder) for block in blocks)


def _markdown(block: Block, *, folder: str) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.words}\n"
    if isinstance(block, Paragraph):
        return f"{block.words}\n"
    if isinstance(block, Grid):
        lines = [block.head, ("---", *["---:"] * (len(block.head) - 1)), *block.rows]
        return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
    return f"![{block.caption}]({folder}/{block.name})\n\n*{block.caption}*\n"


def write_blocks(out: Path, *, name: str, blocks: Sequence[Block], title: str) -> dict[str, Path]:
    """Write ``NAME.html``, ``NAME.md`` and, into ``NAME_files/``, the figures; kind -> path."""
    files = out / f"{name}_files"
    files.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Figure):
            (files / block.name).write_bytes(block.data)
    places = {"html": out / f"{name}.html", "markdown": out / f"{name}.md"}
    contents = {
        "html": to_html(blocks, title=title),
        "markdown": to_markdown(blocks, folder=files.name),
    }
    for kind, path in places.items():
        write_text(path, text=contents[kind])
    return places


def curve_plot(lines: Mapping[str, Sequence[Mapping[str, Any]]], *, x_label: str, y_label: str) -> bytes:
    """SVG of curves with intervals over a shared x axis.

    Args:
        lines: name -> points with ``x``, ``mean``, ``low``, ``high``.
        x_label: below the x axis.
        y_label: above the y axis.
    """
    width, height, left, top, right, bottom = 640, 300, 56, 30, 150, 48
    points = [point for line in lines.values() for point in line]
    xs = sorted({point["x"] for point in points})
    low, high = min(p["low"] for p in points), max(p["high"] for p in points)
    pad = 0.05 * (high - low) or 0.05
    low, high = low - pad, high + pad
    span = (xs[-1] - xs[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - right) * (x - xs[0]) / span,
            height - bottom - (height - top - bottom) * (y - low) / (high - low),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="system-ui, DejaVu Sans, sans-serif" font-size="12"><title>{text(y_label)} by '
        f"{text(x_label)}</title>"
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for i in range(5):
        value = low + (high - low) * i / 4
        y = place(xs[0], value)[1]
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e8ee"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#5b6675">{value:.3g}</text>'
        )
    for x in xs:
        parts.append(
            f'<text x="{place(x, low)[0]:.1f}" y="{height - bottom + 18}" text-anchor="middle" '
            f'fill="#5b6675">{x:g}</text>'
        )
    for number, (name, line) in enumerate(lines.items()):
        parts += _line(name, line=line, place=place, number=number, x=width - right + 14)
    parts.append(f'<text x="{left}" y="16" fill="#1c2430">{text(y_label)}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle" '
        f'fill="#1c2430">{text(x_label)}</text></svg>'
    )
    return "".join(parts).encode("utf-8")


_COLOURS = ("#2b5b9e", "#a8281e", "#14713a", "#8a5a00", "#6a3d9a")


def _line(name: str, *, line: Sequence[Mapping[str, Any]], place: Any, number: int, x: int) -> list[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    corners = " ".join("{:.1f},{:.1f}".format(*place(p["x"], p["mean"])) for p in line)
    parts = [f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for point in line:
        (px, py), y_low, y_high = (
            place(point["x"], point["mean"]), place(point["x"], point["low"])[1],
            place(point["x"], point["high"])[1],
        )  # fmt: skip
        parts.append(
            f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y_low:.1f}" y2="{y_high:.1f}" stroke="{colour}"/>'
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>'
        )
    y = 40 + 18 * number
    parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{text(name)}</text>')
    return parts
