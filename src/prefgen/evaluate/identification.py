"""Whose history is this: one user among N, from a few other histories of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefgen.evaluate.alignment import Estimate, bootstrap

_FLAT = 1e-6
"""A coordinate that moves by less than this share of the largest number says nothing and is not blown up."""


def group_sizes(num_users: int) -> tuple[int, ...]:
    """2, 4, 8, .. and all of them."""
    powers = [2**i for i in range(1, num_users.bit_length()) if 2**i < num_users]
    return (*powers, num_users)


def accuracy_among(scores: Tensor, *, sizes: Sequence[int]) -> dict[int, NDArray[np.float64]]:
    """How often the own user scores highest among N users: the own one and N - 1 drawn from the others.

    Exact for every N: the mean over all such groups. If r others score higher, it is the share
    C(U - 1 - r, N - 1) / C(U - 1, N - 1) of the groups that hold none of them; where t others score the same
    lots are drawn, which is the mean of it over r to r + t.

    Args:
        scores: (U, U) of query i for user j, higher is likelier.
        sizes: N, each 1 to U.

    Returns:
        N -> (U,) accuracy of each query.

    Raises:
        ValueError: not square, or an N that there are not so many users for.
    """
    count = len(scores)
    if scores.shape != (count, count) or not all(1 <= size <= count for size in sizes):
        raise ValueError(f"expected (U, U) scores and sizes of 1 to U, got {tuple(scores.shape)}, {sizes}")
    own = scores.diagonal()[:, None]
    higher = (scores > own).sum(1).numpy()
    equal = (scores == own).sum(1).numpy() - 1
    found = {}
    for size in sizes:
        kept = np.ones(count)
        for rank in range(count - 1):
            left = count - 1 - rank
            kept[rank + 1] = kept[rank] * max(0, left - (size - 1)) / left
        summed = np.concatenate([[0.0], np.cumsum(kept)])
        found[size] = (summed[higher + equal + 1] - summed[higher]) / (equal + 1)
    return found


def identification(
    draws: Tensor, *, num_enrolled: int, seed: int, num_resamples: int = 1000
) -> dict[int, Estimate]:
    """Accuracy of naming the user of a history among N users, for N of :func:`group_sizes`.

    Every history asks once; its user, and every other, is known by the mean of the ``num_enrolled`` histories
    that follow it in turn. Compared by cosine, coordinates standardised over all histories (our choice; no
    classifier is trained, so that one history of a new user is enough).

    Args:
        draws: (U, H, D) embeddings of H histories a user that share no image.
        num_enrolled: 1 to H - 1.
        seed: of the intervals, which are over the users asked about.
        num_resamples: bootstrap draws.

    Raises:
        ValueError: fewer than two users, or too few histories.
    """
    users, histories, _ = draws.shape
    if users < 2 or not 1 <= num_enrolled < histories:
        raise ValueError(f"cannot name one of {users} users by {num_enrolled} of {histories} histories")
    rows = draws.double().cpu()
    scale = rows.std(dim=(0, 1), correction=0).clamp_min(_FLAT * float(rows.abs().max()) + 1e-30)
    rows = (rows - rows.mean(dim=(0, 1))) / scale
    sizes, parts = group_sizes(users), []
    for asked in range(histories):
        enrolled = [(asked + 1 + i) % histories for i in range(num_enrolled)]
        known = torch.nn.functional.normalize(rows[:, enrolled].mean(1), dim=1)
        parts.append(
            accuracy_among(torch.nn.functional.normalize(rows[:, asked], dim=1) @ known.T, sizes=sizes)
        )
    return {
        size: bootstrap(np.mean([part[size] for part in parts], axis=0), seed=seed, draws=num_resamples)
        for size in sizes
    }
