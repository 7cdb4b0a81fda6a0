"""The base of metrics that give one number a picture: averaged within its user, then over users."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from prefgen.evaluate.alignment import Estimate, bootstrap

NUM_RESAMPLES = 2000


class PerUserMetric(Metric):
    """One number a picture, averaged within its user, then over users, with a bootstrap interval.

    A user's pictures resemble each other, so users are resampled and not pictures.

    Args:
        seed: of the resampling.
        num_resamples: bootstrap draws.
    """

    full_state_update = False
    higher_is_better: bool | None = True
    values: list[Tensor]
    users: list[Tensor]

    def __init__(self, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> None:
        super().__init__()
        self.seed, self.num_resamples = seed, num_resamples
        for name in ("values", "users"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def add(self, values: Tensor, *, users: Tensor) -> None:
        """Add pictures: (B,) numbers, and the (B,) number of each picture's user."""
        self.values.append(values.detach().double())
        self.users.append(users)

    def user_numbers(self) -> NDArray[np.int64]:
        """(U,) the users that have pictures, ascending; the rows of :meth:`per_user`."""
        found: NDArray[np.int64] = np.unique(dim_zero_cat(self.users).cpu().numpy())
        return found

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


class MeanScore(PerUserMetric):
    """Any number a picture, e.g. a published scorer's."""

    def update(self, values: Tensor, *, users: Tensor) -> None:
        """Add (B,) numbers with the (B,) number of each picture's user."""
        self.add(values, users=users)
