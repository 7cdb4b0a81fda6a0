"""Pieces of a self-contained HTML page: tables, intervals, pictures as data URIs, a plot of intervals."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1c2430; background: #fff;
  max-width: 1120px; margin: 2rem auto 4rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .4rem; padding-top: .8rem; border-top: 1px solid #d9dee6; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { max-width: 78ch; margin: .4rem 0 .8rem; }
.soft { color: #5b6675; }
table { border-collapse: collapse; margin: .6rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid #e8ebf0; }
th { font-weight: 600; color: #45505f; border-bottom-color: #b9c2cf; }
td.n { white-space: nowrap; font-variant-numeric: tabular-nums; }
.good { color: #14713a; } .bad { color: #a8281e; }
.wide { overflow-x: auto; }
table.grid td, table.grid th { border: 0; padding: .15rem .35rem .15rem 0; text-align: center;
  font-size: .85rem; }
table.grid td:first-child { text-align: left; min-width: 6rem; vertical-align: middle; }
img.tile { width: 96px; height: 96px; object-fit: contain; border: 1px solid #e2e6ec; border-radius: 4px; }
img.strip { max-width: 100%; border: 1px solid #e2e6ec; border-radius: 4px; }
figure { display: inline-block; margin: .4rem 1.2rem .8rem 0; vertical-align: top; }
figcaption { color: #5b6675; font-size: .85rem; max-width: 34rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #2b5b9e; }
.note { background: #fff7e0; border-left: 4px solid #e0b23c; padding: .5rem .9rem; max-width: 80ch; }
"""

_STRIP_COLUMNS = 4


def text(value: object) -> str:
    """Any value as HTML text."""
    return html.escape(str(value), quote=True)


def number(value: float | None, *, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def interval(estimate: Mapping[str, Any] | None, *, digits: int = 3) -> str:
    """``0.812 [0.770, 0.851]``."""
    if estimate is None:
        return "–"
    low, high = (number(estimate[end], digits=digits) for end in ("low", "high"))
    return f"{number(estimate['mean'], digits=digits)} [{low}, {high}]"


def table(head: Sequence[str], *, rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table; cells are HTML already, ``numeric`` names the columns that must not wrap."""
    if not rows:
        return ""
    top = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="n">{c}</td>' if i in numeric else f"<td>{c}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>\n'


def picture(pixels: Tensor, *, label: str, kind: str = "tile") -> str:
    """An ``img`` of pixels (3,H,W) in [-1,1], its bytes inside the page."""
    return f'<img class="{kind}" alt="{text(label)}" title="{text(label)}" src="{_png_uri(_bytes(pixels))}">'


def strip(pixels: Tensor, *, label: str) -> str:
    """Several pictures (N,3,H,W) side by side as one ``img``; a dash where there is none."""
    if not len(pixels):
        return "–"
    tiles = [_bytes(one) for one in pixels]
    height, width = tiles[0].shape[:2]
    columns, gap = min(_STRIP_COLUMNS, len(tiles)), 2
    lines = -(-len(tiles) // columns)
    sheet = np.full((lines * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return f'<img class="strip" alt="{text(label)}" title="{text(label)}" src="{_png_uri(sheet)}">'


def picture_file(path: Path, *, caption: str) -> str:
    """A PNG file inside the page, with a caption."""
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
    words = text(caption)
    return f'<figure><img class="strip" alt="{words}" src="{uri}"><figcaption>{words}</figcaption></figure>'


@dataclass(frozen=True, kw_only=True)
class PlotRow:
    """One line of an interval plot."""

    label: str
    mean: float
    low: float
    high: float


def interval_plot(rows: Sequence[PlotRow], *, middle: float, left: str, right: str) -> str:
    """Points with intervals on [0,1] as inline SVG, with a line at ``middle`` and words for both ends."""
    if not rows:
        return ""
    width, label_width, line = 760, 250, 30
    span, height = width - label_width - 30, line * len(rows) + 46

    def x(value: float) -> float:
        return label_width + span * min(max(value, 0.0), 1.0)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" style="max-width:100%" role="img" '
        f'font-family="inherit" font-size="13"><title>{text(left)} to {text(right)}</title>'
    ]
    bottom = line * len(rows) + 6
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        stroke = "#8a94a3" if tick == middle else "#e4e8ee"
        parts.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="4" y2="{bottom}" stroke="{stroke}"/>')
        parts.append(
            f'<text x="{x(tick)}" y="{bottom + 15}" text-anchor="middle" fill="#5b6675">{tick:g}</text>'
        )
    for i, row in enumerate(rows):
        y = line * i + 20
        colour = "#14713a" if row.low > middle else "#a8281e" if row.high < middle else "#5b6675"
        parts.append(f'<text x="0" y="{y + 4}" fill="#1c2430">{text(row.label)}</text>')
        parts.append(
            f'<line x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}" '
            f'stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'
            f'<circle cx="{x(row.mean):.1f}" cy="{y}" r="5" fill="{colour}"/>'
        )
    ends = (
        f'<text x="{x(0)}" y="{bottom + 33}" fill="#5b6675">{text(left)}</text>'
        f'<text x="{x(1)}" y="{bottom + 33}" fill="#5b6675" text-anchor="end">{text(right)}</text>'
    )
    return "".join(parts) + ends + "</svg>\n"


def page(title: str, *, body: str) -> str:
    """A whole document: one file, nothing fetched from anywhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


def _bytes(pixels: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    unit = (pixels.float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    array: np.ndarray[Any, np.dtype[np.uint8]] = (unit * 255).round().astype(np.uint8)
    return array


def _png_uri(array: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
