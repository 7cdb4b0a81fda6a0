"""What 'prefgen test --stage vqa' writes beside its figures: a table as json, and two plots."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from prefgen.data.agents.world import GROUP_OF
from prefgen.evaluate.alignment import Estimate, bootstrap
from prefgen.evaluate.set_distances import bootstrap_sets
from prefgen.models.calibration import Calibration, Reliability, fit_calibration, reliability
from prefgen.models.questions import UserRows
from prefgen.models.scoring import LikeScores, draw_like
from prefgen.stages.figures import save_figure
from prefgen.whole_file import write_json

REPORT_NAME = "test.json"
CALIBRATION_NAME = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class LikeReport:
    """Like or dislike of test users, measured on images that are no references.

    Attributes:
        by_references: references of either side -> accuracy, over users.
        history_blind: accuracy behind another user's history, at ``num_references``.
        by_group: group of attributes -> accuracy of the questions whose image shows an attribute of it that
            the user likes or dislikes, over users. Attributes that the mini world does not know are "other".
        num_references: references of either side of all but ``by_references``.
        calibration: fitted on validation users; the identity where they liked all or none of the images.
        raw: reliability of the probability of Yes as the model states it.
        calibrated: after the correction.
        raw_error: expected calibration error of ``raw``, over users.
        calibrated_error: that of ``calibrated``.
    """

    by_references: Mapping[int, Estimate]
    history_blind: Estimate
    by_group: Mapping[str, Estimate]
    num_references: int
    calibration: Calibration
    raw: Reliability
    calibrated: Reliability
    raw_error: Estimate
    calibrated_error: Estimate

    def figures(self) -> dict[str, float]:
        """Named numbers for metrics.json."""
        return {
            **{f"accuracy_like_at_{count}": one.mean for count, one in self.by_references.items()},
            **{f"accuracy_like_{group}": one.mean for group, one in self.by_group.items()},
            "accuracy_like_history_blind": self.history_blind.mean,
            "calibration_error_raw": self.raw.error,
            "calibration_error": self.calibrated.error,
        }


def like_report(
    test: Mapping[int, LikeScores],
    *,
    swapped: LikeScores,
    validation: LikeScores,
    users: Sequence[UserRows],
    num_references: int,
    num_queries: int,
    seed: int,
    lora: str = "",
) -> LikeReport:
    """Put the answers of test users together.

    Args:
        test: references of either side -> answers; ``num_references`` is among the keys.
        swapped: answers behind the next user's history.
        validation: answers of other users, to fit the calibration on.
        users: the test users.
        num_references: the count that groups and calibration are read at.
        num_queries: questions a user, and ``seed`` of their draw: to know which images were asked about.
        seed: see there; also of the intervals.
        lora: hash of the LoRA that answered.
    """
    main = test[num_references]
    both = bool(validation.liked.any()) and not bool(validation.liked.all())
    calibration = fit_calibration(validation.probability, truth=validation.liked) if both else Calibration()
    calibration = replace(calibration, lora=lora)
    calibrated = replace(main, probability=calibration.apply(main.probability))
    return LikeReport(
        by_references={count: bootstrap(one.per_user(), seed=seed) for count, one in test.items()},
        history_blind=bootstrap(swapped.per_user(), seed=seed),
        by_group=_by_group(
            main, users=users, num_references=num_references, num_queries=num_queries, seed=seed
        ),
        num_references=num_references,
        calibration=calibration,
        raw=reliability(main.probability, truth=main.liked),
        calibrated=reliability(calibrated.probability, truth=main.liked),
        raw_error=calibration_error(main, seed=seed),
        calibrated_error=calibration_error(calibrated, seed=seed),
    )


def calibration_error(scores: LikeScores, *, seed: int) -> Estimate:
    """Expected calibration error with a 95 % interval over users; see :func:`bootstrap_sets`.

    Raises:
        ValueError: answers of fewer than two users.
    """
    asked = np.unique(scores.user)
    rows = [np.flatnonzero(scores.user == user) for user in asked]

    def error(users: NDArray[np.int64]) -> float:
        drawn = np.concatenate([rows[i] for i in users])
        return reliability(scores.probability[drawn], truth=scores.liked[drawn]).error

    found = bootstrap_sets(error, num_users=len(asked), seed=seed, draws=1000)
    return replace(found, low=max(0.0, found.low))  # the shift may lead below what an error can be


def _by_group(
    scores: LikeScores, *, users: Sequence[UserRows], num_references: int, num_queries: int, seed: int
) -> dict[str, Estimate]:
    shown: list[set[str]] = []
    for user in users:
        history = user.history
        drawn = draw_like(
            history, num_references=(num_references, num_references), num_queries=num_queries, seed=seed
        )
        taste = {*history.liked_attributes, *history.disliked_attributes}
        for is_liked, position in drawn.queries:
            image = (history.liked if is_liked else history.disliked)[position]
            shown.append({GROUP_OF.get(name, "other") for name in image.attributes if name in taste})
    right: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for groups, user_number, correct in zip(shown, scores.user, scores.correct, strict=True):
        for group in groups:
            right[group][int(user_number)].append(float(correct))
    return {
        group: bootstrap([float(np.mean(values)) for values in by_user.values()], seed=seed)
        for group, by_user in sorted(right.items())
    }


def write_like_report(report: LikeReport, *, folder: Path) -> dict[str, NDArray[np.uint8]]:
    """Write test.json, calibration.json, references.png and reliability.png.

    Returns:
        The two plots by name, (H, W, 3), for TensorBoard.
    """
    record = {
        "num_references": report.num_references,
        "by_references": {str(count): asdict(one) for count, one in report.by_references.items()},
        "history_blind": asdict(report.history_blind),
        "by_group": {group: asdict(one) for group, one in report.by_group.items()},
        "calibration": asdict(report.calibration),
        "reliability": {"raw": _plain(report.raw), "calibrated": _plain(report.calibrated)},
        "calibration_error": {"raw": asdict(report.raw_error), "calibrated": asdict(report.calibrated_error)},
        "intervals": "95 %, bootstrap over users",
    }
    write_json(folder / REPORT_NAME, content=record)
    report.calibration.save(folder / CALIBRATION_NAME)
    return {
        "references": _draw(lambda axes: _references(axes, report), path=folder / "references.png"),
        "reliability": _draw(lambda axes: _reliability(axes, report), path=folder / "reliability.png"),
    }


def _plain(one: Reliability) -> dict[str, Any]:
    """Without nan, which json does not know."""
    record = asdict(one)
    for name in ("stated", "true"):
        record[name] = [None if math.isnan(value) else value for value in record[name]]
    return record


def _draw(fill: Any, *, path: Path) -> NDArray[np.uint8]:
    figure = Figure(figsize=(5, 4), dpi=110, layout="constrained")
    fill(figure.add_subplot())
    return save_figure(figure, path=path)


def _references(axes: Axes, report: LikeReport) -> None:
    counts = list(report.by_references)
    means = [report.by_references[count].mean for count in counts]
    below = [one.mean - one.low for one in report.by_references.values()]
    above = [one.high - one.mean for one in report.by_references.values()]
    axes.errorbar(counts, means, yerr=[below, above], marker="o", capsize=3)
    axes.axhline(0.5, color="gray", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("references of either side")
    axes.set_ylabel("accuracy, like or dislike")
    users = next(iter(report.by_references.values())).num_users
    axes.set_title(f"{users} unseen users, 95 % over users", fontsize=10)


def _reliability(axes: Axes, report: LikeReport) -> None:
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":")
    for name, one, error in (
        ("as stated", report.raw, report.raw_error),
        ("calibrated", report.calibrated, report.calibrated_error),
    ):
        label = f"{name}, error {error.mean:.3f} ({error.low:.3f} to {error.high:.3f})"
        axes.plot(one.stated, one.true, marker="o", label=label)
    axes.set_xlabel("stated probability of Yes")
    axes.set_ylabel("share of liked images")
    axes.legend(fontsize=8)
