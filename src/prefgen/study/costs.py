"""What a study cost and with what it was made: seconds, memory, parameters, trials, versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from prefgen.study.plan import Plan
from prefgen.study.runner import read_book

_PACKAGES = ("prefgen", "torch", "lightning", "diffusers", "transformers", "peft", "torchmetrics", "numpy")


def trials(plan: Plan, *, work: Path) -> list[dict[str, Any]]:
    """What was tried before a run, and what was chosen."""
    books = ((run, read_book(work / "runs" / run.folder)) for run in plan.runs if run.trial is not None)
    return [{"run": run.folder, **book["trial"]} for run, book in books if book.get("trial")]


def costs(plan: Plan, *, work: Path) -> list[dict[str, Any]]:
    """Seconds and largest memory of every step of every run, under what the step does."""
    rows = []
    for run in plan.runs:
        for step in read_book(work / "runs" / run.folder).get("steps", []):
            command = step["command"]
            rows.append(
                {
                    "run": run.folder,
                    "step": " ".join(word for word in command[:3] if "=" not in word),
                    "seconds": step["seconds"],
                    "peak_mb": step["peak_mb"],
                }
            )
    return rows


def parameters(plan: Plan, *, work: Path) -> dict[str, int]:
    """Heading -> trained numbers in the safetensors of a stage's folder."""
    found = {}
    for heading, folder in (plan.stages or {}).items():
        root = work / "runs" / folder
        # A run folder's checkpoints hold the same numbers again.
        files = [
            path
            for path in (*root.glob("*.safetensors"), *root.glob("lora/*.safetensors"))
            if path.name != "attribute_readout.safetensors"
        ]
        total = 0
        for path in files:
            with safe_open(path, framework="np") as file:
                names = list(file.keys())
                total += sum(int(np.prod(file.get_slice(name).get_shape())) for name in names)
        if files:
            found[heading] = total
    return found


def versions() -> dict[str, str]:
    """Package -> its version, of those that decide the numbers."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
