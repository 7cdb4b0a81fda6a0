"""The layer study of three MLLMs side by side: fine-tuned, as it was before, and with random weights.

What a random model of the same classes already shows is no sign of anything learned; what the MLLM shows
before fine-tuning is not stage vqa's doing. Each of the three is one ordinary run of stage probe, with its
shuffled labels beside it.

    python tools/layer_study.py --workdir work/demo                       # the mini MLLM and its LoRA
    python tools/layer_study.py --workdir work/x model.mllm=FOLDER data.inter_users=64

Needs the shards and stage vqa's LoRA of the work folder; writes layer_study/ into it: a run folder for each,
heat_maps.png and table.md. Other arguments are settings of stage probe, passed on to all three.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prefgen.config import load_config
from prefgen.models.mllm import MLLM
from prefgen.models.mllm_build import random_twin
from prefgen.run import run_stage
from prefgen.stages.features import model_source

NAMES = {"tuned": "fine-tuned", "base": "before fine-tuning", "random": "random weights"}
TASKS = {"inter": "Which user is this?", "intra": "Liked or disliked?"}


def study(workdir: Path, *, settings: list[str], seed: int) -> dict[str, dict[str, Any]]:
    """Run stage probe three times and read what it reports."""
    out = workdir / "layer_study"
    plain = load_config("probe", overrides=[f"workdir={workdir}", *settings])
    twin = out / "random_mllm"
    if not (twin / "config.json").is_file():
        random_twin(MLLM.load(model_source(plain.model.mllm)), seed=seed).save(twin)
    own = {
        "tuned": [],
        "base": ["model.lora="],
        "random": ["model.lora=", f"model.mllm={twin}", f"data.feature_cache={out / 'random_features'}"],
    }
    reports = {}
    for name, changes in own.items():
        keys = {change.partition("=")[0] for change in changes}
        passed = [setting for setting in settings if setting.partition("=")[0] not in keys]
        overrides = [f"workdir={workdir}", f"run_dir={out / name}", *passed, *changes]
        run_stage(load_config("probe", overrides=overrides), verb="fit", stage="probe")
        reports[name] = json.loads((out / name / "probe.json").read_text(encoding="utf-8"))
    return reports


def draw(reports: dict[str, dict[str, Any]], *, path: Path) -> Path:
    """Accuracy over layers and poolings: a row a task, a column an MLLM, one scale in each row."""
    layers = next(iter(reports.values()))["num_layers"]
    figure = Figure(figsize=(11, 3.2 + 0.4 * layers), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(TASKS), len(reports), squeeze=False)
    for row, (task, title) in enumerate(TASKS.items()):
        chance = next(iter(reports.values()))["tasks"][task]["chance"]
        for column, (name, report) in enumerate(reports.items()):
            poolings = report["poolings"]
            cells = [cell["accuracy"] for cell in report["tasks"][task]["cells"]]
            values = np.array(cells).reshape(report["num_layers"], len(poolings))
            axes = grid[row][column]
            image = axes.imshow(
                values, origin="lower", aspect="auto", vmin=min(chance, values.min()), vmax=1.0
            )
            axes.set_xticks(range(len(poolings)), poolings, fontsize=8)
            axes.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)], fontsize=8)
            axes.set_title(f"{title} {NAMES[name]}\nbest {values.max():.3f}, chance {chance:.3g}", fontsize=9)
        figure.colorbar(image, ax=grid[row].tolist(), label="accuracy")
    figure.savefig(path)
    return path


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Best cell of each pooling with its interval, and the shuffled labels."""
    lines = ["| task | MLLM | pooling | best layer | accuracy (95 % over users) | chance | shuffled labels |"]
    lines.append("|---|---|---|---|---|---|---|")
    for task in TASKS:
        for name, report in reports.items():
            found = report["tasks"][task]
            for pooling in report["poolings"]:
                cells = [cell for cell in found["cells"] if cell["pooling"] == pooling]
                best = max(cells, key=lambda cell: cell["accuracy"])
                lines.append(
                    f"| {task} | {NAMES[name]} | {pooling} | {best['layer']} | {best['accuracy']:.3f} "
                    f"({best['low']:.3f} to {best['high']:.3f}) | {found['chance']:.3f} "
                    f"| {found['control']['mean']:.3f} |"
                )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run, draw, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("work/demo"))
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("settings", nargs="*", help="settings of stage probe, key=value")
    options = parser.parse_args(arguments)
    reports = study(options.workdir, settings=options.settings, seed=options.seed)
    text = table(reports)
    out = options.workdir / "layer_study"
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"heat maps: {draw(reports, path=out / 'heat_maps.png')}")


if __name__ == "__main__":
    main()
