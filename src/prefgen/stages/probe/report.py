"""probe.json and the heat maps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from prefgen.models.pooling import POOLINGS
from prefgen.models.probes import (
    CellAccuracy,
    ChoiceRule,
    LayerChoice,
    choice_to_json,
    control_accuracy,
)
from prefgen.schema import SCHEMA_VERSION

TITLES = {"inter": "Which user is this?", "intra": "Liked or disliked?"}
POOLING_WORDS = {"last": "last token", "image_mean": "mean, images", "mean": "mean, all", "max": "max, all"}


@dataclass(frozen=True, kw_only=True)
class GridReport:
    """One task: every cell, and every cell of the shuffled-label control."""

    cells: tuple[CellAccuracy, ...]
    control: tuple[CellAccuracy, ...]
    num_classes: int
    num_train: int
    num_users: int


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """Both tasks and what was chosen from them."""

    inter: GridReport
    intra: GridReport
    num_layers: int
    choice: LayerChoice
    rule: ChoiceRule
    rule_words: str
    lineage: Mapping[str, str]


def write_report(report: ProbeReport, *, path: Path) -> Path:
    """Write probe.json in one piece."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "lineage": dict(report.lineage),
        "num_layers": report.num_layers,
        "poolings": list(POOLINGS),
        "tasks": {"inter": _task(report.inter), "intra": _task(report.intra)},
        "rule": report.rule,
        "rule_words": report.rule_words,
        "choice": choice_to_json(report.choice),
        "intervals": "95 %, bootstrap over users",
    }
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def heat_map(report: ProbeReport, *, task: Literal["inter", "intra"], path: Path) -> NDArray[np.uint8]:
    """Draw accuracy over layers (top row = top layer) and poolings; chosen cells are framed.

    Returns:
        The picture (H, W, 3), as written to ``path``.
    """
    grid = report.inter if task == "inter" else report.intra
    layers, chance = report.num_layers, 1 / grid.num_classes
    values = np.array([cell.accuracy for cell in grid.cells]).reshape(layers, len(POOLINGS))
    figure = Figure(figsize=(5.2, 1.4 + 0.36 * layers), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        values, origin="lower", aspect="auto", cmap="viridis", vmin=min(chance, values.min()), vmax=1.0
    )
    axes.set_xticks(range(len(POOLINGS)), [POOLING_WORDS[name] for name in POOLINGS])
    axes.set_yticks(range(layers), [str(layer) for layer in range(1, layers + 1)])
    axes.set_ylabel("layer")
    axes.set_title(f"{TITLES[task]}  (chance {chance:.3g}, {grid.num_users} users)", fontsize=10)
    middle = (values.max() + min(chance, values.min())) / 2
    for layer in range(layers):
        for column in range(len(POOLINGS)):
            value = values[layer, column]
            axes.text(
                column,
                layer,
                f"{value:.3f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value < middle else "black",
            )
    for layer, pooling in _chosen(report.choice, task=task):
        corner = (POOLINGS.index(pooling) - 0.47, layer - 1 - 0.47)
        axes.add_patch(_frame(corner))
    figure.colorbar(image, ax=axes, label="accuracy")
    canvas.draw()
    figure.savefig(path)
    picture: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return picture


def _frame(corner: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="red", linewidth=2)


def _chosen(choice: LayerChoice, *, task: str) -> list[tuple[int, Any]]:
    if task == "inter":
        return [(choice.core_layer, choice.core_pooling)]
    return [(layer, choice.sem_pooling) for layer in choice.sem_layers]


def _task(grid: GridReport) -> dict[str, Any]:
    return {
        "num_classes": grid.num_classes,
        "chance": 1 / grid.num_classes,
        "num_train_samples": grid.num_train,
        "num_users": grid.num_users,
        "cells": [asdict(cell) for cell in grid.cells],
        "control": asdict(control_accuracy(grid.control, num_classes=grid.num_classes)),
        "control_cells": [asdict(cell) for cell in grid.control],
    }
