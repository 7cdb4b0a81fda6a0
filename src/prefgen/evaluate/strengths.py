"""Bradley-Terry strengths of conditions from pairwise wins, on the scale of Elo ratings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from prefgen.errors import DataError

ELO_MEAN = 1000.0
ELO_PER_LOGIT = 400 / math.log(10)
"""400 points are odds of ten to one."""

_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One condition's Elo rating with its 95 % bootstrap interval over users; the mean of all is 1000."""

    mean: float
    low: float
    high: float


def bradley_terry(wins: NDArray[np.float64], *, prior_ties: float = 1.0) -> NDArray[np.float64]:
    """Log-strengths of K conditions by maximum likelihood: ``P(i beats j) = 1 / (1 + exp(b_j - b_i))``.

    Args:
        wins: (K,K) how often i beat j; a tie is half a win on both sides. The diagonal is passed over.
        prior_ties: ties added to every pair that was compared, our choice: without them a condition that
            always wins would be infinitely strong. 0 gives the plain maximum.

    Returns:
        (K,) float64, their mean 0.

    Raises:
        DataError: some conditions were never compared with the others, directly or by way of third ones, or,
            without prior, never lost to them.
    """
    counts = np.array(wins, dtype=np.float64)
    np.fill_diagonal(counts, 0)
    counts = counts + prior_ties / 2 * ((counts + counts.T) > 0)
    _check_connected(counts)
    games = counts + counts.T
    count = len(counts)
    values = np.zeros(count)
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(values[None] - values[:, None]))
        gradient = (counts - games * chance).sum(axis=1)
        weights = games * chance * (1 - chance)
        curvature = np.diag(weights.sum(axis=1)) - weights
        # The constant direction is free; the added matrix fixes the mean at 0.
        step = np.linalg.solve(curvature + 1 / count, gradient)
        largest = float(np.abs(step).max())
        values = values + step * min(1.0, 1.0 / max(largest, 1e-300))
        if largest < 1e-12:
            break
    centred: NDArray[np.float64] = values - values.mean()
    return centred


def _check_connected(counts: NDArray[np.float64]) -> None:
    """Every condition must reach every other by a chain of wins; then the maximum exists and is one point."""
    reached = (counts > 0) | np.eye(len(counts), dtype=bool)
    for _ in range(len(counts)):
        reached = (reached.astype(np.int64) @ reached.astype(np.int64)) > 0
    if not reached.all():
        raise DataError(
            "no Bradley-Terry strengths: some conditions were never compared with, or never lost to, the rest"
        )


class EloRatings(Metric):
    """:func:`bradley_terry` fed in batches, as Elo ratings with bootstrap intervals over users.

    Args:
        conditions: names.
        prior_ties: see :func:`bradley_terry`.
        seed: of the resampling.
        num_resamples: bootstrap draws.
    """

    full_state_update = False
    higher_is_better = True
    first: list[Tensor]
    second: list[Tensor]
    outcome: list[Tensor]
    users: list[Tensor]

    def __init__(
        self,
        *,
        conditions: Sequence[str],
        prior_ties: float = 1.0,
        seed: int = 0,
        num_resamples: int = 500,
    ) -> None:
        super().__init__()
        self.conditions, self.prior_ties = tuple(conditions), prior_ties
        self.seed, self.num_resamples = seed, num_resamples
        for name in ("first", "second", "outcome", "users"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, first: str, second: str, *, won: Tensor, users: Tensor) -> None:
        """Add comparisons of two conditions.

        Args:
            first: one condition.
            second: the other.
            won: (B,) 1 where the first won, 0 where it lost, .5 for a tie.
            users: (B,) number of each comparison's user.
        """
        count = len(won)
        self.first.append(torch.full((count,), self.conditions.index(first)))
        self.second.append(torch.full((count,), self.conditions.index(second)))
        self.outcome.append(won.double())
        self.users.append(users)

    def _tables(self) -> NDArray[np.float64]:
        """(U,K,K) wins of each user."""
        users = dim_zero_cat(self.users).cpu().numpy()
        _, place = np.unique(users, return_inverse=True)
        tables = np.zeros((place.max() + 1, len(self.conditions), len(self.conditions)))
        first, second = (dim_zero_cat(x).cpu().numpy() for x in (self.first, self.second))
        won = dim_zero_cat(self.outcome).cpu().numpy()
        np.add.at(tables, (place, first, second), won)
        np.add.at(tables, (place, second, first), 1 - won)
        return tables

    def ratings(self) -> dict[str, Rating]:
        """Condition -> rating.

        Raises:
            DataError: as :func:`bradley_terry`.
        """
        tables = self._tables()
        elo = self._elo(tables.sum(axis=0))
        rng = np.random.default_rng(self.seed)
        drawn = np.stack(
            [
                self._elo(tables[rng.integers(0, len(tables), len(tables))].sum(axis=0))
                for _ in range(self.num_resamples)
            ]
        )
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        return {
            name: Rating(mean=float(elo[i]), low=float(low[i]), high=float(high[i]))
            for i, name in enumerate(self.conditions)
        }

    def _elo(self, wins: NDArray[np.float64]) -> NDArray[np.float64]:
        return ELO_MEAN + ELO_PER_LOGIT * bradley_terry(wins, prior_ties=self.prior_ties)

    def compute(self) -> Tensor:
        """(K,) ratings in the order of ``conditions``."""
        return torch.from_numpy(self._elo(self._tables().sum(axis=0)))
