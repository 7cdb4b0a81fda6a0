"""What core and sem hold of users nobody was trained on: 'prefgen test --stage probe'.

Test users were neither in stage vqa's training nor among those by whom the layers were chosen. Everything is
measured at three places (:data:`prefgen.stages.probe.disjoint.PLACES`), with and without a target image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from prefgen.errors import DataError
from prefgen.evaluate.alignment import bootstrap, ranked_likes
from prefgen.evaluate.identification import identification
from prefgen.evaluate.structure import user_cosines, verdict_cosines
from prefgen.models.mllm import MLLM
from prefgen.models.probes import LayerChoice, choice_to_json
from prefgen.models.questions import UserRows
from prefgen.models.readout import MIN_USERS, fit_readout
from prefgen.stages.features import SplitFeatures
from prefgen.stages.figures import save_figure
from prefgen.stages.probe.config import ProbeConfig
from prefgen.stages.probe.disjoint import (
    PARTS,
    PLACES,
    DisjointHistory,
    Part,
    Place,
    UserReadings,
    disjoint_histories,
    read_histories,
)
from prefgen.whole_file import write_json

REPORT_NAME = "test.json"
PLACE_WORDS: Mapping[str, str] = {
    "question": "no target",
    "target": "one target",
    "targets": "mean over targets",
}


@dataclass(frozen=True, kw_only=True)
class ReadUsers:
    """Users with the histories cut from their images and what was read of each.

    Attributes:
        users: those with images enough.
        histories: of each of them.
        readings: of each of them.
        num_left_out: users with too few images.
    """

    users: tuple[UserRows, ...]
    histories: tuple[tuple[DisjointHistory, ...], ...]
    readings: tuple[UserReadings, ...]
    num_left_out: int

    def at(self, place: Place, *, part: Part) -> Tensor:
        """(U, H, D)."""
        return torch.stack([one.at(place, part=part) for one in self.readings])


def cut_and_read(
    config: ProbeConfig, *, mllm: MLLM, choice: LayerChoice, split: SplitFeatures, keep: int | None = None
) -> ReadUsers:
    """Cut and read the users of a split; ``keep`` reads only the first so many histories of each."""
    data = config.data
    cut = [
        disjoint_histories(
            user,
            count=data.test_histories,
            num_references=data.inter_references,
            num_targets=data.test_targets,
            seed=config.seed,
        )[:keep]
        for user in split.users
    ]
    histories = tuple(one for one in cut if one)
    readings = read_histories(
        mllm,
        users=histories,
        image_features=split.features,
        choice=choice,
        batch_size=data.rows_per_pass,
    )
    return ReadUsers(
        users=tuple(user for user, one in zip(split.users, cut, strict=True) if one),
        histories=histories,
        readings=tuple(readings),
        num_left_out=len(cut) - len(histories),
    )


def unseen_report(
    config: ProbeConfig,
    *,
    mllm: MLLM,
    choice: LayerChoice,
    test: SplitFeatures,
    train: SplitFeatures,
    lineage: Mapping[str, str],
) -> dict[str, Any]:
    """Identification, cosines and readable likes of core and sem at every place, as it stands in test.json.

    Args:
        config: of the stage.
        mllm: the model whose layers were chosen.
        choice: where core and sem are read.
        test: the users measured.
        train: users on whom the reading of likes is fitted.
        lineage: part -> hash of the models.

    Raises:
        DataError: fewer than two test users with images enough.
    """
    found = cut_and_read(config, mllm=mllm, choice=choice, split=test)
    data = config.data
    if len(found.users) < 2:
        raise DataError(
            f"core and sem are measured on 2 or more test users whose images fill {data.test_histories} "
            f"histories with a target each, but {len(found.users)} of {len(test.users)} have so many; lower "
            f"data.test_histories={data.test_histories} or add test users"
        )
    known = cut_and_read(config, mllm=mllm, choice=choice, split=train, keep=1)
    references = [one.num_references for histories in found.histories for one in histories]
    with torch.autocast("cpu", enabled=False):  # figures do not depend on the precision of the run
        parts = {part: _part(found, known=known, part=part, config=config) for part in PARTS}
    return {
        "num_users": len(found.users),
        "num_left_out": found.num_left_out,
        "num_histories": data.test_histories,
        "mean_references": float(np.mean(references)),
        "mean_targets": float(np.mean([one.liked.shape[1] for one in found.readings])),
        "parts": parts,
        "choice": choice_to_json(choice),
        "lineage": dict(lineage),
        "intervals": "95 %, bootstrap over users",
    }


def _part(found: ReadUsers, *, known: ReadUsers, part: Part, config: ProbeConfig) -> dict[str, Any]:
    draw = {"seed": config.seed, "num_resamples": config.probe.num_resamples}
    record: dict[str, Any] = {}
    for place in PLACES:
        states = found.at(place, part=part)
        record[place] = {
            "identification": {
                str(enrolled): {
                    str(size): asdict(one)
                    for size, one in identification(states, num_enrolled=enrolled, **draw).items()
                }
                for enrolled in _enrolled(states.shape[1])
            },
            "cosines": asdict(user_cosines(list(states), **draw)),
            "likes": _readable_likes(found, known=known, place=place, part=part, config=config),
        }
    # The first history alone: its targets differ, the rest of the prompt does not.
    behind = [getattr(one, part)[0, 1:] for one in found.readings]
    several = [rows for rows in behind if len(rows) > 1]
    record["other_targets"] = asdict(user_cosines(several, **draw)) if len(several) > 1 else None
    verdicts = verdict_cosines(
        [getattr(one, part)[:, 1:] for one in found.readings],
        liked=[one.liked for one in found.readings],
        **draw,
    )
    record["verdict"] = asdict(verdicts) if verdicts is not None else None
    return record


def _enrolled(histories: int) -> list[int]:
    """1, 2, 4, .. and all but the one asked about."""
    most = histories - 1
    return sorted({2**i for i in range(most.bit_length()) if 2**i < most} | {most})


def _readable_likes(
    found: ReadUsers, *, known: ReadUsers, place: Place, part: Part, config: ProbeConfig
) -> dict[str, Any] | None:
    """Area under each user's ROC curve over attributes, by a linear reading; None without attributes.

    ``by_share`` is what the attributes' shares among the training users alone would give.
    """
    told = all(user.history.liked_attributes for user in (*found.users, *known.users))
    if not told or len(known.users) < MIN_USERS:
        return None
    names = sorted({name for user in known.users for name in user.history.liked_attributes})
    readout = fit_readout(
        known.at(place, part=part)[:, 0],
        labels=_labels(known.users, names=names),
        attributes=names,
        lineage={},
    )
    labels, states = _labels(found.users, names=names), found.at(place, part=part)
    areas = torch.stack(
        [ranked_likes(readout.probabilities(states[:, i]), labels=labels) for i in range(states.shape[1])]
    ).mean(0)
    shares = ranked_likes(readout.share.expand(len(labels), -1), labels=labels)
    measured = areas.isfinite()
    if not bool(measured.any()):
        return None
    draw = {"seed": config.seed, "draws": config.probe.num_resamples}
    return {
        **asdict(bootstrap(areas[measured].numpy(), **draw)),
        "by_share": float(shares[measured].mean()),
        "num_train_users": len(known.users),
    }


def _labels(users: Sequence[UserRows], *, names: Sequence[str]) -> Tensor:
    return torch.tensor([[name in user.history.liked_attributes for name in names] for user in users])


def unseen_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Named numbers for metrics.json: without a target, all but one history known, among all users."""
    figures = {}
    for part in PARTS:
        plain = report["parts"][part]["question"]
        most = plain["identification"][str(report["num_histories"] - 1)]
        figures[f"identification_{part}"] = most[str(report["num_users"])]["mean"]
        figures[f"cosine_gap_{part}"] = plain["cosines"]["gap"]["mean"]
        if plain["likes"] is not None:
            figures[f"readable_likes_{part}"] = plain["likes"]["mean"]
    return figures


def write_unseen_report(report: Mapping[str, Any], *, folder: Path) -> NDArray[np.uint8]:
    """Write test.json and identification.png; the plot (H, W, 3) for TensorBoard."""
    write_json(folder / REPORT_NAME, content=report)
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(PARTS), sharey=True)
    for axes, name in zip(panels, PARTS, strict=True):
        plot_identification(axes, report, part=name)
        axes.set_title(f"{name}, {report['num_users']} unseen users", fontsize=10)
    legend_above(panels[0])
    return save_figure(figure, path=folder / "identification.png")


def plot_identification(axes: Axes, report: Mapping[str, Any], *, part: Part) -> None:
    """Accuracy against N, a line for each number of known histories; dashed behind one target."""
    plain = report["parts"][part]["question"]["identification"]
    lines = [(f"{enrolled} known", plain[enrolled], "-") for enrolled in plain]
    last = str(report["num_histories"] - 1)
    lines.append((f"{last} known, one target", report["parts"][part]["target"]["identification"][last], "--"))
    for label, by_size, style in lines:
        sizes, found = [int(size) for size in by_size], list(by_size.values())
        means = [one["mean"] for one in found]
        # A mean of equal values may leave its interval by the last bit.
        spread = [
            [max(0.0, one["mean"] - one["low"]) for one in found],
            [max(0.0, one["high"] - one["mean"]) for one in found],
        ]
        axes.errorbar(sizes, means, yerr=spread, marker="o", capsize=3, linestyle=style, label=label)
    axes.plot(sizes, [1 / size for size in sizes], color="gray", linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("users to choose from")
    axes.set_ylabel("own user named")


def legend_above(axes: Axes) -> None:
    """One legend for all panels, outside them: inside it would cover what it explains."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
