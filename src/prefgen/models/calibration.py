"""Is a stated probability true? Reliability in bins, its expected error, and a logistic correction."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prefgen.errors import CheckpointError, DataError

NUM_BINS = 10
_NEWTON_STEPS = 50
_FARTHEST = 30.0
"""Logits are cut to +-30: a probability of exactly 0 or 1 has none."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """What was stated and what was true, in bins of equal width over [0, 1].

    Attributes:
        counts: (bins,) answers.
        stated: (bins,) their mean probability; nan in an empty bin.
        true: (bins,) share of them that were right to say yes; nan in an empty bin.
        error: expected calibration error, the mean of abs(stated - true) over answers, in [0, 1].
    """

    counts: tuple[int, ...]
    stated: tuple[float, ...]
    true: tuple[float, ...]
    error: float


def reliability(
    probability: NDArray[np.float64], *, truth: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> Reliability:
    """Bin probabilities (N,) of yes against the truth (N,).

    Raises:
        DataError: no answers, or a probability outside [0, 1].
    """
    if len(probability) == 0 or probability.min() < 0 or probability.max() > 1:
        raise DataError("reliability needs at least one probability, all within [0, 1]")
    bins = np.minimum((probability * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        stated = np.bincount(bins, weights=probability, minlength=num_bins) / counts
        true = np.bincount(bins, weights=truth.astype(np.float64), minlength=num_bins) / counts
    error = float((np.nan_to_num(np.abs(stated - true)) * counts).sum() / counts.sum())
    return Reliability(
        counts=tuple(counts.tolist()), stated=tuple(stated.tolist()), true=tuple(true.tolist()), error=error
    )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """sigmoid(slope * logit + offset); 1 and 0 change nothing.

    Attributes:
        slope: below 1 where the model is too sure.
        offset: above 0 where it says no too often.
        num_answers: how many answers it was fitted on.
        lora: hash of the LoRA whose answers they were; empty where that is not known.
    """

    slope: float = 1.0
    offset: float = 0.0
    num_answers: int = 0
    lora: str = ""

    def apply(self, probability: NDArray[np.float64]) -> NDArray[np.float64]:
        """Corrected probabilities, same shape."""
        corrected: NDArray[np.float64] = _sigmoid(self.slope * _logit(probability) + self.offset)
        return corrected

    def save(self, path: Path) -> Path:
        """Write json."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    @staticmethod
    def load(path: Path, *, lora: str = "") -> Calibration:
        """Read json.

        Args:
            path: the file.
            lora: hash of the LoRA whose answers are to be corrected; empty is not compared.

        Raises:
            CheckpointError: absent, damaged, or fitted on the answers of another LoRA.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            calibration = Calibration(
                slope=float(found["slope"]),
                offset=float(found["offset"]),
                num_answers=int(found["num_answers"]),
                lora=str(found.get("lora", "")),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"no calibration at {path}; run 'prefgen test --stage vqa' to make it"
            ) from None
        if lora and calibration.lora and calibration.lora != lora:
            raise CheckpointError(
                f"{path} was fitted on the answers of another LoRA ({calibration.lora[:12]}) than this one "
                f"({lora[:12]}); run 'prefgen test --stage vqa' again, or delete it"
            )
        return calibration


def fit_calibration(probability: NDArray[np.float64], *, truth: NDArray[np.bool_]) -> Calibration:
    """Slope and offset by Newton's method on the cross-entropy (Platt 1999), on users of no test.

    Targets are drawn in from 0 and 1 by one answer each, so that answers without error keep a finite slope.

    Raises:
        DataError: all answers are of one kind.
    """
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        raise DataError("calibration needs liked and disliked images; got one kind only")
    wanted = np.where(truth, (positive + 1) / (positive + 2), 1 / (negative + 2))
    rows = np.stack([_logit(probability), np.ones(len(probability))], axis=1)
    found = np.array([1.0, 0.0])
    for _ in range(_NEWTON_STEPS):
        stated = _sigmoid(rows @ found)
        gradient = rows.T @ (stated - wanted)
        curvature = (rows * (stated * (1 - stated))[:, None]).T @ rows + 1e-9 * np.eye(2)
        # a whole Newton step overshoots where the curve is flat
        step = np.clip(np.linalg.solve(curvature, gradient), -1, 1)
        found = found - step
        if float(np.abs(step).max()) < 1e-10:
            break
    return Calibration(slope=float(found[0]), offset=float(found[1]), num_answers=len(truth))


def _logit(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    tiny = math.exp(-_FARTHEST)
    inside = np.clip(probability, tiny, 1 - 1e-13)
    logits: NDArray[np.float64] = np.log(inside) - np.log1p(-inside)
    return logits


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    stated: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(logits, -_FARTHEST, _FARTHEST)))
    return stated
