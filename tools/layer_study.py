"""The layer study of three MLLMs side by side: fine-tuned, as it was before, and with random weights.

What a random model of the same classes already shows is no sign of anything learned; what the MLLM shows
before fine-tuning is not stage vqa's doing; what shuffled labels show is chance. Each of the three is one
ordinary run of stage probe, fitted and tested, with its shuffled labels beside it.

    python tools/layer_study.py --workdir work/demo                       # the mini MLLM and its LoRA
    python tools/layer_study.py --workdir work/x model.mllm=FOLDER data.inter_users=64

Needs the shards and stage vqa's LoRA of the work folder; writes layer_study/ into it: a run folder for each,
report.md, report.json, heat_maps.png, identification.png and cosines.png. Other arguments are settings of
stage probe, passed on to all three; without them the inter-user task is read with and without a target image,
and every cell is probed by AdamW, ridge and logistic regression.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prefgen.config import load_config
from prefgen.errors import PrefgenError
from prefgen.lineage import hash_json
from prefgen.models.mllm import MLLM
from prefgen.models.mllm_build import random_twin
from prefgen.run import run_stage
from prefgen.stages.features import model_hash, model_source
from prefgen.stages.probe.disjoint import PARTS, PLACES
from prefgen.stages.probe.report import POOLING_WORDS, TITLES
from prefgen.stages.probe.unseen import PLACE_WORDS, legend_above, plot_identification

NAMES = {"tuned": "fine-tuned", "base": "before fine-tuning", "random": "random weights"}
DEFAULTS = ("data.inter_target=true", "probe.classifiers=[adamw,ridge,logistic]")
Record = dict[str, Any]


def study(workdir: Path, *, settings: list[str], seed: int) -> dict[str, Record]:
    """Fit and test stage probe three times; read probe.json, and test.json as its "unseen"."""
    out = workdir / "layer_study"
    given = {setting.partition("=")[0] for setting in settings}
    settings = [*(one for one in DEFAULTS if one.partition("=")[0] not in given), *settings]
    plain = load_config("probe", overrides=[f"workdir={workdir}", *settings])
    for required in plain.required_inputs():
        required.check()
    twin = out / f"random_mllm-{hash_json([model_hash(plain.model.mllm), seed])[:8]}"
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
        config = load_config(
            "probe", overrides=[f"workdir={workdir}", f"run_dir={out / name}", *passed, *changes]
        )
        for verb in ("fit", "test"):
            run_stage(config, verb=verb, stage="probe")
        reports[name] = json.loads((out / name / "probe.json").read_text(encoding="utf-8"))
        reports[name]["unseen"] = json.loads((out / name / "test.json").read_text(encoding="utf-8"))
    return reports


def draw_heat_maps(reports: dict[str, Record], *, path: Path) -> Path:
    """Accuracy over layers and poolings: a row a task, a column an MLLM and one for the shuffled labels."""
    first = next(iter(reports.values()))
    layers, tasks = first["num_layers"], first["tasks"]
    figure = Figure(
        figsize=(3.6 * (len(reports) + 1), (1.6 + 0.2 * layers) * len(tasks)), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(tasks), len(reports) + 1, squeeze=False)
    for row, task in enumerate(tasks):
        maps = {NAMES[name]: report["tasks"][task]["cells"] for name, report in reports.items()}
        maps["shuffled labels"] = tasks[task]["control_cells"]
        chance = tasks[task]["chance"]
        values = [np.array([cell["accuracy"] for cell in cells]) for cells in maps.values()]
        low = min(chance, *(float(one.min()) for one in values))
        for axes, title, one in zip(grid[row], maps, values, strict=True):
            image = axes.imshow(one.reshape(layers, -1), origin="lower", aspect="auto", vmin=low, vmax=1.0)
            words = [POOLING_WORDS[name] for name in first["poolings"]]
            axes.set_xticks(range(len(words)), words, fontsize=7, rotation=20)
            axes.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)], fontsize=7)
            axes.set_title(
                f"{TITLES[task]} {title}\nbest {one.max():.3f}, mean {one.mean():.3f}, chance {chance:.3g}",
                fontsize=8,
            )
        figure.colorbar(image, ax=grid[row].tolist(), label="accuracy")
    figure.savefig(path)
    return path


def draw_identification(reports: dict[str, Record], *, path: Path) -> Path:
    """Which of N unseen users: a row a part, a column an MLLM."""
    figure = Figure(figsize=(4.2 * len(reports), 7.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(PARTS), len(reports), squeeze=False, sharey=True)
    for row, part in enumerate(PARTS):
        for axes, (name, report) in zip(grid[row], reports.items(), strict=True):
            plot_identification(axes, report["unseen"], part=part)
            axes.set_title(f"{part}, {NAMES[name]}", fontsize=10)
    legend_above(grid[0][0])
    figure.savefig(path)
    return path


def draw_cosines(reports: dict[str, Record], *, path: Path) -> Path:
    """Within users and between them, over disjoint histories and over targets: a panel a part."""
    figure = Figure(figsize=(5.5 * len(PARTS), 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PARTS), sharey=True)
    for axes, part in zip(panels, PARTS, strict=True):
        _cosine_bars(axes, reports, part=part)
    legend_above(panels[0])
    figure.savefig(path)
    return path


def _cosine_bars(axes: Axes, reports: dict[str, Record], *, part: str) -> None:
    compared = {"histories": ("question", "cosines"), "targets": ("other_targets",)}
    places, labels, bars = [], [], []
    for number, (name, report) in enumerate(reports.items()):
        for offset, (what, keys) in enumerate(compared.items()):
            found: Any = report["unseen"]["parts"][part]
            for key in keys:
                found = found[key]
            if found is not None:
                places.append(number * 2.5 + offset)
                labels.append(f"{NAMES[name]}\nother {what}")
                bars.append(found)
    for kind, shift in (("within", -0.2), ("between", 0.2)):
        means = [bar[kind]["mean"] for bar in bars]
        errors = [
            [max(0.0, sign * (bar[kind][end] - bar[kind]["mean"])) for bar in bars]
            for end, sign in (("low", -1), ("high", 1))
        ]
        axes.bar([x + shift for x in places], means, width=0.4, yerr=errors, capsize=3, label=f"{kind} users")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xticks(places, labels, fontsize=7, rotation=30)
    axes.set_title(part, fontsize=10)
    axes.set_ylabel("cosine from the common mean")


def markdown(reports: dict[str, Record]) -> str:
    """All tables."""
    parts = [
        "# Layer study",
        "Intervals are 95 %, over users. Best cells are best of all layers and poolings on the held-out "
        "users, so read them beside the best cell of the shuffled labels.",
        "## Best layer of each pooling",
        _poolings(reports),
        "## Classifiers",
        _classifiers(reports),
        "## Which of N unseen users",
        "Nearest mean of a few other histories that share no image with the one asked about, by cosine; "
        "nothing is trained on these users.",
        _identification(reports),
        "## With and without a target image",
        "The representation is read at the open question (no target), at the question about one target, or "
        "averaged over the targets.",
        _places(reports),
        "## Is core stable, is sem about taste?",
        "Cosines from the common mean: of one user's disjoint histories (no target) and of others'; of one "
        "history behind different targets; of targets with the same and with another verdict behind "
        "different histories.",
        _cosines(reports),
    ]
    return "\n\n".join(parts) + "\n"


def _poolings(reports: dict[str, Record]) -> str:
    rows = []
    for name, task, found in _tasks(reports):
        control = found["control"]
        for pooling in reports[name]["poolings"]:
            best = _best([cell for cell in found["cells"] if cell["pooling"] == pooling])
            shuffled = f"{control['mean']:.3f} ({control['low']:.3f} to {control['high']:.3f})"
            top = _best(found["control_cells"])["accuracy"]
            rows.append(
                [
                    task,
                    NAMES[name],
                    pooling,
                    best["layer"],
                    _interval(best, mean="accuracy"),
                    f"{found['chance']:.3f}",
                    shuffled,
                    f"{top:.3f}",
                ]
            )
    head = ["task", "MLLM", "pooling", "best layer", "accuracy", "chance"]
    return _table([*head, "shuffled labels, mean over cells", "their best cell"], rows)


def _classifiers(reports: dict[str, Record]) -> str:
    rows = []
    for name, task, found in _tasks(reports):
        for classifier, cells in {found["classifier"]: found["cells"], **found["other_classifiers"]}.items():
            best = _best(cells)
            mean = float(np.mean([cell["accuracy"] for cell in cells]))
            where = f"{best['layer']}, {best['pooling']}"
            rows.append(
                [task, NAMES[name], classifier, where, _interval(best, mean="accuracy"), f"{mean:.3f}"]
            )
    return _table(["task", "MLLM", "classifier", "best cell", "accuracy", "mean over cells"], rows)


def _identification(reports: dict[str, Record]) -> str:
    rows, sizes = [], []
    for name, part, found in _parts(reports):
        for place in ("question", "target"):
            for known, by_size in found[place]["identification"].items():
                sizes = list(by_size)
                own = [_interval(one) for one in by_size.values()]
                rows.append([NAMES[name], part, PLACE_WORDS[place], known, *own])
    rows.append(["chance", "", "", "", *(f"{1 / int(size):.3f}" for size in sizes)])
    return _table(["MLLM", "part", "read with", "known histories", *(f"N = {size}" for size in sizes)], rows)


def _places(reports: dict[str, Record]) -> str:
    rows = []
    for name, part, found in _parts(reports):
        unseen = reports[name]["unseen"]
        for place in PLACES:
            own = found[place]
            among = own["identification"][str(unseen["num_histories"] - 1)][str(unseen["num_users"])]
            likes = own["likes"]
            words = "-" if likes is None else f"{_interval(likes)}, by share {likes['by_share']:.3f}"
            rows.append(
                [
                    NAMES[name],
                    part,
                    PLACE_WORDS[place],
                    _interval(among),
                    _interval(own["cosines"]["gap"]),
                    words,
                ]
            )
    head = ["MLLM", "part", "read with", "own user among all", "cosine within less between"]
    return _table([*head, "likes ranked above the rest (area under the curve)"], rows)


def _cosines(reports: dict[str, Record]) -> str:
    rows = []
    for name, part, found in _parts(reports):
        compared = {
            "other histories": (found["question"]["cosines"], "within", "between"),
            "other targets": (found["other_targets"], "within", "between"),
            "verdict of the target": (found["verdict"], "same", "different"),
        }
        for what, (one, first, second) in compared.items():
            cells = ["-"] * 3 if one is None else [_interval(one[key]) for key in (first, second, "gap")]
            rows.append([NAMES[name], part, what, f"{first}, {second}", *cells])
    return _table(["MLLM", "part", "over", "cosines", "first", "second", "difference"], rows)


def _tasks(reports: dict[str, Record]) -> list[tuple[str, str, Record]]:
    first = next(iter(reports.values()))
    return [
        (name, task, report["tasks"][task]) for task in first["tasks"] for name, report in reports.items()
    ]


def _parts(reports: dict[str, Record]) -> list[tuple[str, str, Record]]:
    return [
        (name, part, report["unseen"]["parts"][part]) for part in PARTS for name, report in reports.items()
    ]


def _best(cells: list[Record]) -> Record:
    return max(cells, key=lambda cell: cell["accuracy"])


def _interval(one: Record, *, mean: str = "mean") -> str:
    return f"{one[mean]:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Run, draw, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("work/demo"))
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("settings", nargs="*", help="settings of stage probe, key=value")
    options = parser.parse_args(arguments)
    try:
        reports = study(options.workdir, settings=options.settings, seed=options.seed)
    except PrefgenError as error:
        print(f"layer_study: error: {error}", file=sys.stderr)
        return 2
    out = options.workdir / "layer_study"
    text = markdown(reports)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.json").write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    print(text)
    print(f"heat maps: {draw_heat_maps(reports, path=out / 'heat_maps.png')}")
    print(f"which of N users: {draw_identification(reports, path=out / 'identification.png')}")
    print(f"cosines: {draw_cosines(reports, path=out / 'cosines.png')}")
    print(f"report: {out / 'report.md'}, {out / 'report.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
