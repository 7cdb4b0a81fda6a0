"""Who draws what a user likes: win rates over users with intervals, as functions and torchmetrics Metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from prefgen.evaluate.alignment import Estimate, bootstrap

NUM_RESAMPLES = 2000


def user_wins(own: NDArray[np.float64], against: NDArray[np.float64]) -> NDArray[np.float64]:
    """(U,) share of a user's pictures with the higher utility, ties half.

    Args:
        own: (U,P) utilities of one condition, a row a user, a column a prompt.
        against: (U,P) of the other, from the same noise.

    Raises:
        ValueError: the shapes differ or are not (U,P).
    """
    if own.shape != against.shape or own.ndim != 2 or own.size == 0:
        raise ValueError(f"expected two (U,P) tables of one shape, got {own.shape} and {against.shape}")
    won: NDArray[np.float64] = ((own > against) + 0.5 * (own == against)).mean(axis=1)
    return won


def win_rate(
    own: NDArray[np.float64],
    against: NDArray[np.float64],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """Mean over users of :func:`user_wins`, with a 95 % bootstrap interval over users.

    A user's pictures resemble each other, so users are resampled and not pictures.
    """
    return bootstrap(user_wins(own, against), seed=seed, draws=num_resamples)


def share_of(
    part: NDArray[np.float64], whole: NDArray[np.float64], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Estimate:
    """Mean of ``part`` as a share of the mean of ``whole``, both (U,) of the same users, resampled together.

    Raises:
        ValueError: the users differ in number, or there are none.
    """
    if part.shape != whole.shape or part.ndim != 1 or part.size == 0:
        raise ValueError(f"expected two (U,) rows of the same users, got {part.shape} and {whole.shape}")
    rows = np.random.default_rng(seed).integers(0, part.size, size=(num_resamples, part.size))
    ratios = part[rows].mean(axis=1) / np.maximum(whole[rows].mean(axis=1), 1e-12)
    low, high = np.quantile(ratios, [0.025, 0.975])
    mean = float(part.mean() / max(float(whole.mean()), 1e-12))
    return Estimate(mean=mean, low=float(low), high=float(high), num_users=int(part.size))


class _PerUser(Metric):
    """One number a picture, averaged within its user, then over users, with a bootstrap interval."""

    full_state_update = False
    higher_is_better = True
    values: list[Tensor]
    users: list[Tensor]

    def __init__(self, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> None:
        super().__init__()
        self.seed, self.num_resamples = seed, num_resamples
        for name in ("values", "users"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def per_user(self) -> NDArray[np.float64]:
        """(U,) means, in the order of the users' numbers."""
        users = dim_zero_cat(self.users).cpu().numpy()
        _, place = np.unique(users, return_inverse=True)
        total = np.bincount(place, weights=dim_zero_cat(self.values).double().cpu().numpy())
        means: NDArray[np.float64] = total / np.bincount(place)
        return means

    def estimate(self) -> Estimate:
        """Mean and interval."""
        return bootstrap(self.per_user(), seed=self.seed, draws=self.num_resamples)

    def compute(self) -> dict[str, Tensor]:
        """``mean``, ``low``, ``high`` as 0-dim tensors."""
        found = self.estimate()
        return {
            name: torch.tensor(getattr(found, name), dtype=torch.float64) for name in ("mean", "low", "high")
        }


class WinRate(_PerUser):
    """:func:`win_rate` fed in batches."""

    def update(self, own: Tensor, against: Tensor, *, users: Tensor) -> None:
        """Add pictures.

        Args:
            own: (B,) utilities of one condition.
            against: (B,) of the other.
            users: (B,) number of each picture's user.
        """
        self.values.append((own > against).double() + 0.5 * (own == against).double())
        self.users.append(users)


class PromptFidelity(_PerUser):
    """How often a judge, choosing among the given subjects only, names the prompt's subject.

    Args:
        subjects: the judge's subjects, in the order of its head.
        among: the subjects it may choose from, e.g. those of the evaluation's prompts.
        seed: of the resampling.
        num_resamples: bootstrap draws.

    Raises:
        ValueError: the judge does not know one of ``among``.
    """

    def __init__(
        self,
        *,
        subjects: Sequence[str],
        among: Sequence[str],
        seed: int = 0,
        num_resamples: int = NUM_RESAMPLES,
    ) -> None:
        super().__init__(seed=seed, num_resamples=num_resamples)
        unknown = sorted(set(among) - set(subjects))
        if unknown or not among:
            raise ValueError(f"the judge knows no subject {unknown[0]!r}" if unknown else "no subjects given")
        self.among = tuple(among)
        self.columns = [list(subjects).index(name) for name in among]

    def update(self, probabilities: Tensor, *, prompts: Sequence[str], users: Tensor) -> None:
        """Add pictures: the judge's (B,subjects) probabilities, and what each should show."""
        named = probabilities[:, self.columns].argmax(dim=1).tolist()
        hits = [self.among[column] == prompt for column, prompt in zip(named, prompts, strict=True)]
        self.values.append(torch.tensor(hits, dtype=torch.float64))
        self.users.append(users)
