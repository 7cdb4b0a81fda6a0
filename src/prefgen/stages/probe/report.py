"""probe.json and the heat maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from prefgen.stages.figures import save_figure
from prefgen.whole_file import write_json

TITLES = {
    "inter": "Which user is this?",
    "intra": "Liked or disliked?",
    "inter_target": "Which user, behind a target?",
}
POOLING_WORDS = {"last": "last token", "image_mean": "mean, images", "mean": "mean, all", "max": "max, all"}


@dataclass(frozen=True, kw_only=True)
class GridReport:
    """One reading: every cell, and every cell of the shuffled-label control.

    Attributes:
        classifiers: name -> cells; the first one chooses the layers.
        control: the first classifier's cells on shuffled labels.
        num_classes: classes of the task.
        num_train: training samples.
        num_users: users tested on.
    """

    classifiers: Mapping[str, tuple[CellAccuracy, ...]]
    control: tuple[CellAccuracy, ...]
    num_classes: int
    num_train: int
    num_users: int

    @property
    def cells(self) -> tuple[CellAccuracy, ...]:
        """The first classifier's."""
        return next(iter(self.classifiers.values()))


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """All readings and what was chosen from them.

    Attributes:
        grids: "inter", "intra" and, where it was asked for, "inter_target".
        num_layers: L.
        choice: where core and sem are read.
        rule: by which rule.
        lineage: part -> hash.
    """

    grids: Mapping[str, GridReport]
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
        "tasks": {name: _task(grid) for name, grid in report.grids.items()},
        "rule": report.rule,
        "rule_words": report.rule_words,
        "choice": choice_to_json(report.choice),
        "intervals": "95 %, bootstrap over users",
    }
    write_json(path, content=record)
    return path


def heat_map(report: ProbeReport, *, reading: str, path: Path) -> NDArray[np.uint8]:
    """Draw accuracy over layers (top row = top layer) and poolings; chosen cells are framed.

    Returns:
        The picture (H, W, 3), as written to ``path``.
    """
    grid = report.grids[reading]
    layers, chance = report.num_layers, 1 / grid.num_classes
    values = np.array([cell.accuracy for cell in grid.cells]).reshape(layers, len(POOLINGS))
    figure = Figure(figsize=(5.2, 1.4 + 0.36 * layers), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        values, origin="lower", aspect="auto", cmap="viridis", vmin=min(chance, values.min()), vmax=1.0
    )
    axes.set_xticks(range(len(POOLINGS)), [POOLING_WORDS[name] for name in POOLINGS])
    axes.set_yticks(range(layers), [str(layer) for layer in range(1, layers + 1)])
    axes.set_ylabel("layer")
    axes.set_title(f"{TITLES[reading]}  (chance {chance:.3g}, {grid.num_users} users)", fontsize=10)
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
    for layer, pooling in _chosen(report.choice, reading=reading):
        corner = (POOLINGS.index(pooling) - 0.47, layer - 1 - 0.47)
        axes.add_patch(_frame(corner))
    figure.colorbar(image, ax=axes, label="accuracy")
    return save_figure(figure, path=path)


def _frame(corner: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="red", linewidth=2)


def _chosen(choice: LayerChoice, *, reading: str) -> list[tuple[int, Any]]:
    chosen: dict[str, list[tuple[int, Any]]] = {
        "inter": [(choice.core_layer, choice.core_pooling)],
        "intra": [(layer, choice.sem_pooling) for layer in choice.sem_layers],
    }
    return chosen.get(reading, [])


def _task(grid: GridReport) -> dict[str, Any]:
    return {
        "num_classes": grid.num_classes,
        "chance": 1 / grid.num_classes,
        "num_train_samples": grid.num_train,
        "num_users": grid.num_users,
        "classifier": next(iter(grid.classifiers)),
        "cells": [asdict(cell) for cell in grid.cells],
        "other_classifiers": {
            name: [asdict(cell) for cell in cells] for name, cells in list(grid.classifiers.items())[1:]
        },
        "control": asdict(control_accuracy(grid.control, num_classes=grid.num_classes)),
        "control_cells": [asdict(cell) for cell in grid.control],
    }
