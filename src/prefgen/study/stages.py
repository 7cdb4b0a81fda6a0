"""What the stages have written about themselves: probe.json, metrics.json, steps and sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefgen.errors import CheckpointError

RUNS = ("vqa", "probe", "align", "align_independent", "inject", "inject_image_only")


def read_json(path: Path) -> dict[str, Any] | None:
    """A json object, or None where there is no such file.

    Raises:
        CheckpointError: the file is torn or no object.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is torn ({error}); run its stage again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no json object; run its stage again")
    return content


def probe_figures(path: Path) -> dict[str, Any]:
    """Both tasks of probe.json: the best chosen cell, its margin over chance, and the control.

    Raises:
        CheckpointError: the file is not stage probe's.
    """
    record = read_json(path)
    try:
        assert record is not None
        choice = record["choice"]
        chosen = {
            "inter": [(choice["core"]["layer"], choice["core"]["pooling"])],
            "intra": [(layer, choice["sem"]["pooling"]) for layer in choice["sem"]["layers"]],
        }
        tasks = {name: _task(record["tasks"][name], chosen=chosen[name]) for name in ("inter", "intra")}
        return {**tasks, "choice": choice, "rule": record["rule_words"]}
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no probe.json of this version ({type(error).__name__} {error}); "
            "run 'prefgen fit --stage probe' again"
        ) from None


def _task(task: Mapping[str, Any], *, chosen: list[tuple[int, str]]) -> dict[str, Any]:
    cells = [cell for cell in task["cells"] if (cell["layer"], cell["pooling"]) in chosen]
    best = max(cells, key=lambda cell: cell["accuracy"])
    return {
        "accuracy": {"mean": best["accuracy"], "low": best["low"], "high": best["high"]},
        "layer": best["layer"],
        "pooling": best["pooling"],
        "chance": task["chance"],
        "low_above_chance": best["low"] - task["chance"],
        "num_users": task["num_users"],
        "control": {name: task["control"][name] for name in ("mean", "low", "high")},
    }


def align_figures(run_dir: Path) -> dict[str, Any] | None:
    """Retrieval, its permuted control, and MMD before and after, of one fit of stage align.

    Test users' figures where ``prefgen test --stage align`` was run, else those of the validation users.
    None where the run folder has no figures.
    """
    record = read_json(run_dir / "metrics.json")
    if record is None:
        return None
    after, prefix = (record["test"], "test") if "test" in record else (record.get("fit", {}), "val")
    found: dict[str, Any] = {"users": "test" if prefix == "test" else "validation"}
    for name in ("recall", "permuted_recall", "ceiling_recall"):
        for depth in ("1", "10"):
            mean = after.get(f"{prefix}/{name}_{depth}")
            if mean is not None:
                low, high = (after.get(f"{prefix}/{name}_{depth}_{end}") for end in ("low", "high"))
                found[f"{name}_{depth}"] = {"mean": mean, "low": low, "high": high}
    for name in ("chance_1", "chance_10", "num_users", "spread_ratio", "separability"):
        if f"{prefix}/{name}" in after:
            found[name] = after[f"{prefix}/{name}"]
    for name in ("neighbourhood_overlap", "readable_sem", "readable_aligned"):
        if f"{prefix}/{name}" in after:
            found[name] = after[f"{prefix}/{name}"]
    found["mmd_before"] = record.get("before", {}).get("val/mmd2")
    found["mmd_after"] = record.get("fit", {}).get("val/mmd2")
    return found


def run_figures(run_dir: Path) -> dict[str, Any] | None:
    """Steps trained and the artefact's size; None where the stage has not run."""
    record = read_json(run_dir / "metrics.json")
    if record is None:
        return None
    figures: dict[str, Any] = {"steps": record.get("steps"), "epochs": record.get("epochs")}
    for name in ("lora", "probe.json", "projector.safetensors", "user_adapter.safetensors"):
        path = run_dir / name
        if path.exists():
            figures["artefact"] = name
            figures["bytes"] = _size(path)
    return figures


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
