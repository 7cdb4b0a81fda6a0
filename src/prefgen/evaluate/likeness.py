"""Metrics on embeddings given from outside: CLIP-T, CLIP-I, DINO, diversity within a user, copying."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from prefgen.evaluate.copying import Distance, nearest_distances
from prefgen.evaluate.per_user import NUM_RESAMPLES, PerUserMetric


class PairCosine(PerUserMetric):
    """Cosine of two embeddings of one picture, -1 to 1: CLIP-T where they are its image's and its prompt's.

    Published CLIPScores multiply it by 100 (torchmetrics) or 2.5 (arXiv 2104.08718) and cut it at 0; here
    it is the plain cosine.
    """

    def update(self, first: Tensor, second: Tensor, *, users: Tensor) -> None:
        """Add pictures: two (B,D) sets of any norm, and the (B,) number of each picture's user."""
        self.add(torch.cosine_similarity(first.double(), second.double(), dim=1), users=users)


class HistoryLikeness(PerUserMetric):
    """Mean cosine of a picture with the images its user liked, -1 to 1: CLIP-I or DINO, by the embeddings.

    A picture that copies the history scores high too: read it beside :class:`HistoryDistance`.
    """

    def update(self, pictures: Tensor, *, liked: Sequence[Tensor], users: Tensor) -> None:
        """Add pictures.

        Args:
            pictures: (B,D) embeddings.
            liked: for each picture the (N,D) embeddings of its user's liked images, N >= 1.
            users: (B,) number of each picture's user.
        """
        rows = [
            torch.cosine_similarity(one.double()[None], own.double(), dim=1).mean()
            for one, own in zip(pictures, liked, strict=True)
        ]
        self.add(torch.stack(rows), users=users)


class HistoryDistance(PerUserMetric):
    """Distance of a picture to the nearest image of its user's history; see :func:`nearest_distances`."""

    higher_is_better = None  # near 0 is copying, far away is another world

    def __init__(self, *, distance: Distance, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> None:
        super().__init__(seed=seed, num_resamples=num_resamples)
        self.distance: Distance = distance

    def update(self, pictures: Tensor, *, histories: Sequence[Tensor], users: Tensor) -> None:
        """Add (B,..) pictures with the (N,..) images of each one's user."""
        self.add(nearest_distances(pictures, histories=histories, distance=self.distance), users=users)


class UserDiversity(PerUserMetric):
    """Mean pairwise cosine distance (0 to 2) among the pictures of one user; users with one are left out."""

    def update(self, pictures: Tensor, *, users: Tensor) -> None:
        """Add (B,D) embeddings with the (B,) number of each picture's user."""
        unit = torch.nn.functional.normalize(pictures.detach().double(), dim=1)
        self.values.append(unit)
        self.users.append(users)

    def _groups(self) -> list[tuple[int, Tensor]]:
        users, rows = dim_zero_cat(self.users), dim_zero_cat(self.values)
        found = [(int(user), rows[users == user]) for user in torch.unique(users)]
        return [(user, own) for user, own in found if len(own) > 1]

    def user_numbers(self) -> NDArray[np.int64]:
        """(U,) the users that have two pictures or more."""
        return np.array([user for user, _ in self._groups()], dtype=np.int64)

    def per_user(self) -> NDArray[np.float64]:
        """(U,) mean distance of each such user's pairs."""
        means = []
        for _, own in self._groups():
            count = len(own)
            total = (own @ own.T).sum() - own.pow(2).sum()
            means.append(1 - float(total) / (count * (count - 1)))
        return np.array(means, dtype=np.float64)
