"""``dial.json`` as tables and plots, and the same prompts across the dial to look at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from PIL import Image

from prefgen.dials.figures import RIVALS
from prefgen.dials.measure import Measurements
from prefgen.dials.plan import CURVES, DialPlan
from prefgen.evaluate.blocks import Block, Figure, Grid, Heading, Paragraph, write_blocks
from prefgen.evaluate.page import interval
from prefgen.whole_file import write_json

DIAL_FILE = "dial.json"

_COLOURS = {"base": "#1b6ca8", "other": "#c2571a", "image_only": "#5b8c2a"}
_TENSORS = ("sem_embeds", "core_embeds", "image_embeds", "image_mean", "sem_negative", "core_negative")
_GAP = 4
_MOST_WIDTH = 1600

_ABOUT = {
    "user_scale": "Own and other pictures at each user_scale; image only stays at 1.",
    "negative_user_scale": "user_scale {strength:g}; the disliked side steers the unconditional branch.",
    "images": "Profiles built from so many liked and as many disliked images, user_scale {strength:g}.",
    "liked": "Profiles built from so many liked images and no disliked ones, user_scale {strength:g}.",
    "updates": "Built from {first} of either side, then updated image by image; other: built at once.",
}


def write_dial(
    dial: Mapping[str, Any], *, plan: DialPlan, measurements: Measurements, out: Path, attribution: str
) -> dict[str, Path]:
    """Write ``dial.json``, ``dial.html``, ``dial.md`` and ``dial_files/*.png`` into ``out``."""
    path = out / DIAL_FILE
    write_json(path, content=dial, allow_nan=False)
    blocks = dial_blocks(dial, plan=plan, measurements=measurements, attribution=attribution)
    return {"json": path, **write_blocks(out, name="dial", blocks=blocks, title="prefgen: the dials")}


def dial_blocks(
    dial: Mapping[str, Any], *, plan: DialPlan, measurements: Measurements, attribution: str
) -> list[Block]:
    """The whole report."""
    blocks: list[Block] = [
        Heading(words="What the dials do", level=1),
        Paragraph(
            words=f"{dial['num_users']} users and subjects that nothing was trained on, "
            f"{dial['settings']['num_prompts']} prompts each, the same noise everywhere. Win rate: how often "
            "the own picture has the higher utility (liked minus disliked probability by the judge), ties "
            "half. Brackets are 95 % bootstrap intervals over users."
        ),
        Paragraph(words=_ends(dial)),
    ]
    words = {"strength": plan.strength, "first": plan.images[0]}
    for name, points in dial["curves"].items():
        caption = _ABOUT[name].format(**words)
        blocks += [
            Heading(words=CURVES[name]),
            Figure(
                name=f"{name}.png",
                data=_plot(points, x_label=CURVES[name], base=dial["base"]),
                caption=caption,
            ),
            _curve_table(points, x_label=CURVES[name]),
        ]
    blocks += _update_blocks(dial)
    for name in ("user_scale", "negative_user_scale", "images"):
        points = plan.curves()[name]
        strips = [measurements.load(one) for one in (plan.base, *(point.own for point in points))]
        caption = f"First users, one a row: the base model, then {CURVES[name]} "
        caption += ", ".join(f"{point.x:g}" for point in points) + f". {attribution}"
        blocks.append(
            Figure(name=f"pictures_{name}.png", data=_montage([one.shown for one in strips]), caption=caption)
        )
    return blocks


def _ends(dial: Mapping[str, Any]) -> str:
    words = f"Prompt fidelity of the base model: {interval(dial['base']['prompt_fidelity'])}."
    if "image_only" in dial:
        words += f" Image only wins over it: {interval(dial['image_only']['against_base'])}."
    if "zero_is_base" in dial:
        equal = "are" if dial["zero_is_base"] else "are NOT"
        words += f" The pictures at user_scale 0 {equal} the base model's, bit for bit."
    return words


def _curve_table(points: Sequence[Mapping[str, Any]], *, x_label: str) -> Grid:
    rivals = [name for name in RIVALS if f"own_vs_{name}" in points[0]]
    head = (x_label, *(RIVALS[name] for name in rivals), "utility", "prompt fidelity", "share of base's")
    rows = tuple(
        (
            f"{point['x']:g}",
            *(interval(point[f"own_vs_{name}"]) for name in rivals),
            interval(point["utility"]),
            interval(point["prompt_fidelity"]),
            interval(point["prompt_fidelity_kept"]),
        )
        for point in points
    )
    return Grid(head=head, rows=rows)


def _update_blocks(dial: Mapping[str, Any]) -> list[Block]:
    rows = tuple(
        (
            f"{one['images']}",
            interval(one["wins"]),
            interval(one["utility"]),
            f"{one['utility']['p_holm']:.3f}",
        )
        for one in dial["updates_minus_built"]
    )
    names = [name for name in _TENSORS if name in dial["distances"][0]["tensors"]]
    distances = tuple(
        (f"{row['compared']}, {row['images']}", *(interval(row["tensors"][name], digits=4) for name in names))
        for row in dial["distances"]
    )
    return [
        Heading(words="Updated one image at a time against built from all"),
        Paragraph(
            words="Wins of pictures by updated profiles over those by profiles built at once from the same "
            "images, ties half; the difference in utility with the p-value of a sign-flip test after Holm's "
            "correction."
        ),
        Grid(head=("images", "wins", "difference in utility", "p"), rows=rows),
        Paragraph(
            words="1 - cosine of each tensor to the built profile's. For scale: the same images in other "
            "draws, and another user's profile."
        ),
        Grid(head=("profile, images", *names), rows=distances),
    ]


def _plot(points: Sequence[Mapping[str, Any]], *, x_label: str, base: Mapping[str, Any]) -> bytes:
    """Win rates on the left, prompt fidelity on the right, both with their intervals."""
    canvas = Canvas(figsize=(10, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(canvas)
    wins, fidelity = canvas.subplots(1, 2)
    places = [float(i) if "images" in x_label else point["x"] for i, point in enumerate(points)]
    # Side by side, or the intervals would hide each other.
    step = 0.012 * (places[-1] - places[0])
    for number, (name, words) in enumerate(RIVALS.items()):
        if f"own_vs_{name}" in points[0]:
            line = [point[f"own_vs_{name}"] for point in points]
            shifted = [place + (number - 1) * step for place in places]
            _line(wins, places=shifted, line=line, colour=_COLOURS[name], label=words)
    wins.axhline(0.5, color="#888888", linewidth=0.8, linestyle=":")
    wins.set_ylabel("win rate")
    line = [point["prompt_fidelity"] for point in points]
    _line(fidelity, places=places, line=line, colour="#333333", label="own")
    known = base["prompt_fidelity"]
    fidelity.axhspan(known["low"], known["high"], color=_COLOURS["base"], alpha=0.15)
    fidelity.axhline(known["mean"], color=_COLOURS["base"], linewidth=1, label="base model")
    fidelity.set_ylabel("prompt fidelity")
    for axes in (wins, fidelity):
        axes.set_xlabel(x_label)
        axes.set_xticks(places, [f"{point['x']:g}" for point in points])
        axes.legend(fontsize=8)
        axes.grid(alpha=0.25)
    return _png(canvas)


def _line(
    axes: Axes, *, places: Sequence[float], line: Sequence[Mapping[str, Any]], colour: str, label: str
) -> None:
    means = [one["mean"] for one in line]
    below = [one["mean"] - one["low"] for one in line]
    above = [one["high"] - one["mean"] for one in line]
    axes.errorbar(
        list(places),
        means,
        yerr=[below, above],
        color=colour,
        marker="o",
        markersize=4,
        capsize=3,
        label=label,
    )


def _png(canvas: Canvas) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _montage(columns: Sequence[np.ndarray]) -> bytes:
    """Columns of pictures (S,H,W,3) side by side, shrunk where they would be wider than a page."""
    rows, height, width, _ = columns[0].shape
    sheet = Image.new("RGB", (len(columns) * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for column, pictures in enumerate(columns):
        for row, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (column * (width + _GAP), row * (height + _GAP)))
    sheet.thumbnail((_MOST_WIDTH, _MOST_WIDTH))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
