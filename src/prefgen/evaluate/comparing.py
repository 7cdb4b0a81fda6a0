"""Paired comparison of two conditions over the same users: difference, interval, test, many comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prefgen.evaluate.alignment import bootstrap

EXACT_USERS = 14
"""Up to so many users every pattern of signs is tried; beyond it some are drawn."""

NUM_FLIPS = 20_000
"""Sign patterns drawn where there are too many to try all: the smallest p is about 5e-5."""

_TIE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One condition against another, user by user.

    Attributes:
        mean: mean over users of first minus second.
        low: lower end of the 95 % bootstrap interval over users.
        high: upper end.
        p: two-sided p-value of the sign-flip test.
        p_holm: the same after Holm's correction within its family; equal to ``p`` for a family of one.
        num_users: users on both sides.
    """

    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    num_users: int


def sign_flip_p(differences: NDArray[np.float64], *, seed: int = 0, num_flips: int = NUM_FLIPS) -> float:
    """Two-sided p-value that paired differences are symmetric about 0, by Fisher's sign-flip test.

    Exact for up to ``EXACT_USERS`` values; otherwise ``(1 + hits) / (1 + num_flips)`` over drawn patterns.

    Args:
        differences: (U,) one a user.
        seed: of the drawn patterns.
        num_flips: how many are drawn.

    Raises:
        ValueError: no differences.
    """
    if differences.ndim != 1 or differences.size == 0:
        raise ValueError(f"expected (U,) differences, got {differences.shape}")
    count = differences.size
    reached = abs(differences.sum()) * (1 - _TIE)  # sums of the same numbers differ in their last bits
    if count <= EXACT_USERS:
        patterns = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
        sums = np.abs((1 - 2.0 * patterns) @ differences)
        return float((sums >= reached).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, num_flips, 1000):
        signs = 1 - 2.0 * rng.integers(0, 2, (min(1000, num_flips - start), count))
        hits += int((np.abs(signs @ differences) >= reached).sum())
    return (1 + hits) / (1 + num_flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): p-values that hold for the whole family, in the given order.

    Raises:
        ValueError: a value outside [0, 1].
    """
    values = np.asarray(p_values, dtype=np.float64)
    if ((values < 0) | (values > 1)).any():
        raise ValueError(f"p-values must lie in [0, 1], got {p_values}")
    order = np.argsort(values, kind="stable")
    factors = np.arange(values.size, 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * values[order]))
    return [float(value) for value in corrected]


def compare(
    first: NDArray[np.float64], second: NDArray[np.float64], *, seed: int, num_resamples: int
) -> Comparison:
    """First minus second, both (U,) of the same users.

    Raises:
        ValueError: the users differ in number.
    """
    if first.shape != second.shape:
        raise ValueError(f"expected two (U,) rows of the same users, got {first.shape} and {second.shape}")
    differences = np.asarray(first - second, dtype=np.float64)
    found = bootstrap(differences, seed=seed, draws=num_resamples)
    p = sign_flip_p(differences, seed=seed)
    return Comparison(
        mean=found.mean, low=found.low, high=found.high, p=p, p_holm=p, num_users=found.num_users
    )


def corrected(family: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The comparisons of one family with Holm's correction over all of them."""
    values = holm([one.p for one in family.values()])
    return {name: replace(one, p_holm=p) for (name, one), p in zip(family.items(), values, strict=True)}
