"""Krippendorff's alpha: how far several people's answers agree beyond chance."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prefgen.evaluate.alignment import Estimate

Level = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(answers: NDArray[np.float64], *, level: Level = "nominal") -> float:
    """Alpha of Krippendorff (Content Analysis, chapter 12): 1 agreement, 0 chance, below 0 worse than chance.

    Args:
        answers: (raters, units) numbers, NaN where a rater did not answer; units with fewer than two answers
            say nothing and are left out.
        level: what a difference between two answers means.

    Returns:
        Alpha; NaN where nobody's answers can be compared, or all are one and the same value.
    """
    units = [column[~np.isnan(column)] for column in np.asarray(answers, dtype=np.float64).T]
    units = [column for column in units if column.size > 1]
    if not units:
        return float("nan")
    values, codes = np.unique(np.concatenate(units), return_inverse=True)
    together = np.zeros((values.size, values.size))
    start = 0
    for column in units:
        own = np.bincount(codes[start : start + column.size], minlength=values.size)
        together += (np.outer(own, own) - np.diag(own)) / (column.size - 1)
        start += column.size
    marginal = together.sum(axis=1)
    distance = _distances(values, marginal=marginal, level=level)
    expected = (np.outer(marginal, marginal) * distance).sum() / (marginal.sum() - 1)
    if expected == 0:
        return float("nan")
    return float(1 - (together * distance).sum() / expected)


def _distances(
    values: NDArray[np.float64], *, marginal: NDArray[np.float64], level: Level
) -> NDArray[np.float64]:
    if level == "nominal":
        return 1 - np.eye(values.size)
    if level == "interval":
        squared: NDArray[np.float64] = (values[:, None] - values[None]) ** 2
        return squared
    # Ordinal: how many answers lie between two values, half of each end counted.
    middle = np.cumsum(marginal) - marginal / 2
    ranks: NDArray[np.float64] = (middle[:, None] - middle[None]) ** 2
    return ranks


def alpha_estimate(
    answers: NDArray[np.float64], *, level: Level = "nominal", seed: int, draws: int = 1000
) -> Estimate | None:
    """Alpha with a 95 % bootstrap interval over units; None where it is not defined.

    Resamplings in which alpha is not defined (one value only) are passed over.
    """
    value = krippendorff_alpha(answers, level=level)
    if np.isnan(value):
        return None
    rng = np.random.default_rng(seed)
    count = answers.shape[1]
    found = [krippendorff_alpha(answers[:, rng.integers(0, count, count)], level=level) for _ in range(draws)]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return Estimate(mean=value, low=float(low), high=float(high), num_users=count)
