"""The data card: what an import holds, in words (``card.md``) and to look at (``card.png``)."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from prefgen.data.images import decode_image
from prefgen.data.sources.output import Counts
from prefgen.schema import Side, UserHistory

TEXT_NAME, PICTURE_NAME = "card.md", "card.png"

_GREEN, _RED = "#1b7f4b", "#b3362b"
_TILE, _COLUMNS, _GAP = 128, 6, 8
_WIDTH, _HEAD, _CELL, _LABEL = 12.0, 3.25, 0.93, 0.36
"""Inches: of the page, of what stands above the users, of a tile with its gap, of a line of text."""

_SIDES: tuple[tuple[Side, str], ...] = (("liked", _GREEN), ("disliked", _RED))


def write_card(
    report: dict[str, Any], *, counts: Counts, samples: list[UserHistory], folder: Path, work: Path
) -> None:
    """Write both files into ``work``.

    Args:
        report: ``import.json``.
        counts: for the histograms.
        samples: users whose images are shown.
        folder: where their image paths start.
        work: where the files go.
    """
    (work / TEXT_NAME).write_text(card_text(report), encoding="utf-8")
    rows = [1 if max(len(h.liked), len(h.disliked)) <= _COLUMNS else 2 for h in samples]
    page = _Page(height=_HEAD + sum(count * _CELL + _LABEL for count in rows) + 0.1)
    page.figure.text(
        0.03, 1 - 0.2 / page.height, f"Imported from {report['importer']}", va="top", fontsize=16
    )
    page.figure.text(
        0.03,
        1 - 0.75 / page.height,
        _summary(report),
        va="top",
        fontsize=10,
        linespacing=1.5,
        parse_math=False,
    )
    for place, (side, colour) in enumerate(_SIDES):
        of_side = counts.liked if side == "liked" else counts.disliked
        axes = page.axes(left=5.7 + 3.2 * place, top=0.55, width=2.7, height=2.0)
        _histogram(axes, of_side, side=side, colour=colour)
    top = _HEAD
    for history, count in zip(samples, rows, strict=True):
        for place, (side, colour) in enumerate(_SIDES):
            axes = page.axes(
                left=0.36 + place * 5.8, top=top + _LABEL, width=_COLUMNS * _CELL, height=count * _CELL
            )
            _side(axes, history=history, side=side, colour=colour, rows=count, folder=folder)
        top += count * _CELL + _LABEL
    page.figure.savefig(work / PICTURE_NAME, metadata={"Software": None})


class _Page:
    """A figure whose parts are placed in inches from the top left."""

    def __init__(self, *, height: float) -> None:
        self.height = height
        self.figure = Figure(figsize=(_WIDTH, height), dpi=100, facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, *, left: float, top: float, width: float, height: float) -> Any:
        bottom = (self.height - top - height) / self.height
        return self.figure.add_axes((left / _WIDTH, bottom, width / _WIDTH, height / self.height))


def card_text(report: dict[str, Any]) -> str:
    """Markdown of the card."""
    kept, read = report["kept"], report["read"]
    lines = [
        f"# Data card: import from {report['importer']}",
        "",
        f"Judged by: {report['source']}. Licence: {report['licence']}. Made by prefgen {report['prefgen']}:",
        "",
        f"    {report['command']}",
        "",
        "| split | users | liked | disliked |",
        "|---|---|---|---|",
        *(
            f"| {split} | {c['users']:,} | {c['liked']:,} | {c['disliked']:,} |"
            for split, c in kept["splits"].items()
        ),
        f"| all | {kept['users']:,} | {kept['liked']:,} | {kept['disliked']:,} |",
        "",
        f"{kept['images']:,} different images, {kept['image_bytes'] / 1e6:,.1f} MB. "
        f"Read: {read['users']:,} users, {read['judgements']:,} judged images.",
        "",
        "## What was left out",
        "",
        "| why | judgements | users |",
        "|---|---|---|",
        *(f"| {s['step']} | {s['judgements']:,} | {s['users']:,} |" for s in report["cleaning"]),
        *(f"| not usable: {reason} | {number:,} | |" for reason, number in report["skipped"].items()),
    ]
    reasons = [
        f"- {step['step']}: {number:,} x {reason}"
        for step in report["cleaning"]
        for reason, number in step["reasons"].items()
    ]
    lines += ["", *reasons] if reasons else []
    if report["notes"]:
        lines += ["", "## How the source was understood", "", *(f"- {note}" for note in report["notes"])]
    if report["files"]:
        lines += ["", "## Source files", "", *(_file_line(file) for file in report["files"])]
    return "\n".join([*lines, "", "![samples](card.png)", ""])


def _file_line(file: dict[str, Any]) -> str:
    return f"- `{file['name']}`, {file['bytes']:,} bytes, sha256 {file['sha256']}"


def _summary(report: dict[str, Any]) -> str:
    kept = report["kept"]
    lines = [
        f"{kept['users']:,} users judged {kept['liked'] + kept['disliked']:,} times "
        f"({kept['liked']:,} liked, {kept['disliked']:,} disliked)",
        f"{kept['images']:,} different images, {kept['image_bytes'] / 1e6:,.1f} MB; "
        f"judged by: {report['source']}",
        "users: " + ", ".join(f"{c['users']:,} {split}" for split, c in kept["splits"].items()),
        "",
    ]
    left_out = [f"{step['judgements']:,} {step['step']}" for step in report["cleaning"] if step["judgements"]]
    left_out += [f"{number:,} {reason}" for reason, number in report["skipped"].items()]
    lines += _wrapped("left out: " + (", ".join(left_out) or "nothing"))
    lines += _wrapped(f"licence: {report['licence']}")
    return "\n".join(lines)


def _wrapped(text: str, *, width: int = 62, most: int = 3) -> list[str]:
    return textwrap.wrap(text, width=width, max_lines=most, placeholder=" ..")


def _histogram(axes: Any, sizes: Counter[int], *, side: Side, colour: str) -> None:
    """Users by number of images of one side; the last 1 % share one bar, or a few would squash the rest."""
    values = np.array(list(sizes), dtype=np.int64)
    users = np.array(list(sizes.values()), dtype=np.int64)
    order = np.argsort(values)
    reach = np.searchsorted(np.cumsum(users[order]), 0.99 * users.sum())
    high = max(int(values[order][min(reach, len(order) - 1)]), 1)
    width = -(-(high + 1) // 20)
    bins = np.arange(0, high + 1 + width, width) - 0.5
    axes.hist(np.minimum(values, high), bins=bins, weights=users, color=colour, rwidth=0.9)
    more = f" (last bar: {bins[-2] + 0.5:.0f} or more)" if values.max() > high else ""
    axes.set_xlabel(f"{side} images of a user{more}", fontsize=9)
    axes.set_ylabel("users", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _side(axes: Any, *, history: UserHistory, side: Side, colour: str, rows: int, folder: Path) -> None:
    """Images of one side of one user, below what they are."""
    axes.axis("off")
    images = history.side(side)
    shown = images[: rows * _COLUMNS]
    label = f"{history.user_id[:40]} ({history.split}): {len(images)} {side}"
    label += f", the first {len(shown)}" if len(shown) < len(images) else ""
    axes.set_title(label, loc="left", fontsize=10, color=colour, parse_math=False, pad=4)
    tiles = _tiles([folder / image.image for image in shown], rows=rows)
    axes.imshow(tiles, interpolation="antialiased", aspect="auto")


def _tiles(files: list[Path], *, rows: int) -> npt.NDArray[np.uint8]:
    """(rows, 6 columns) of squares on white, padded where an image is none."""
    pitch = _TILE + _GAP
    sheet = Image.new("RGB", (_COLUMNS * pitch, rows * pitch), "white")
    for number, file in enumerate(files):
        image = decode_image(file.read_bytes(), where=str(file), any_format=True)
        row, column = divmod(number, _COLUMNS)
        sheet.paste(ImageOps.pad(image, (_TILE, _TILE), color="#eeeeee"), (column * pitch, row * pitch))
    return np.asarray(sheet)
