"""Is the structure of a set of users kept: CKA, cosines within and between users, and what verdicts move.

``separability`` and ``neighbourhood_overlap`` stand in :mod:`prefgen.evaluate.alignment`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefgen.evaluate.alignment import Estimate, bootstrap


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment (arXiv 1905.00414, eq. 2): 1 where rows are alike up to rotation.

    Biased upwards where there are not many more rows than coordinates; compare equal shapes.

    Args:
        first: (N,D1) rows.
        second: (N,D2) the same rows elsewhere.

    Raises:
        ValueError: different numbers of rows, or fewer than two.
    """
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second) or len(first) < 2:
        raise ValueError(f"expected two sets of N >= 2 rows, got {tuple(first.shape)}, {tuple(second.shape)}")
    x, y = (rows.double() - rows.double().mean(dim=0) for rows in (first, second))
    shared = (x.T @ y).pow(2).sum()
    alone = (x.T @ x).pow(2).sum().sqrt() * (y.T @ y).pow(2).sum().sqrt()
    return float(shared / alone.clamp_min(1e-300))


@dataclass(frozen=True, kw_only=True)
class UserCosines:
    """Cosines of embeddings seen from their common mean, which a language model's states share.

    Attributes:
        within: mean over users of the mean cosine among a user's own draws.
        between: mean over users of the mean cosine with the other users' draws.
        gap: within minus between, user by user: 0 means the draws do not know whose they are.
    """

    within: Estimate
    between: Estimate
    gap: Estimate


def user_cosines(draws: Sequence[Tensor], *, seed: int, num_resamples: int = 1000) -> UserCosines:
    """How much more a user's reference draws resemble each other than those of others.

    Args:
        draws: for each user (R,D), R >= 2; at least two users.
        seed: of the intervals.
        num_resamples: bootstrap draws over users.

    Raises:
        ValueError: fewer than two users, or a user with fewer than two draws.
    """
    if len(draws) < 2 or min(len(own) for own in draws) < 2:
        raise ValueError("cosines need at least 2 users with 2 draws each")
    rows = torch.cat([own.double() for own in draws])
    unit = torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=1)
    owner = torch.repeat_interleave(torch.arange(len(draws)), torch.tensor([len(own) for own in draws]))
    total = unit.sum(dim=0)
    within, between = [], []
    for user, own in enumerate(draws):
        mine = unit[owner == user]
        count, summed = len(own), mine.sum(dim=0)
        within.append(float(summed @ summed - mine.pow(2).sum()) / (count * (count - 1)))
        between.append(float(summed @ (total - summed)) / (count * (len(rows) - count)))

    def estimate(values: list[float]) -> Estimate:
        return bootstrap(np.array(values), seed=seed, draws=num_resamples)

    gaps = [a - b for a, b in zip(within, between, strict=True)]
    return UserCosines(within=estimate(within), between=estimate(between), gap=estimate(gaps))


@dataclass(frozen=True, kw_only=True)
class VerdictCosines:
    """Cosines of one user's embeddings read at targets, from the mean of all users' as in UserCosines.

    Attributes:
        same: mean cosine of two targets of which the user likes both, or neither.
        different: mean cosine of a liked and a disliked target.
        gap: same minus different, user by user: 0 means the embedding does not know the verdict.
    """

    same: Estimate
    different: Estimate
    gap: Estimate


def verdict_cosines(
    draws: Sequence[Tensor], *, liked: Sequence[Tensor], seed: int, num_resamples: int = 1000
) -> VerdictCosines | None:
    """How much an embedding read behind a target depends on whether the user likes the target.

    Only targets behind different histories are compared: those behind one history resemble each other anyway,
    and are liked and disliked by turns.

    Args:
        draws: for each user (H, Q, D): Q targets behind each of H histories.
        liked: for each user (H, Q) booleans.
        seed: of the intervals over users.
        num_resamples: bootstrap draws over users.

    Returns:
        None where no user has both kinds of pairs.
    """
    rows = torch.cat([own.double().flatten(0, 1) for own in draws])
    centre = rows.mean(dim=0)
    same, different = [], []
    for own, verdicts in zip(draws, liked, strict=True):
        unit = torch.nn.functional.normalize(own.double().flatten(0, 1) - centre, dim=1)
        cosines = unit @ unit.T
        history = torch.arange(len(own)).repeat_interleave(own.shape[1])
        apart = history[:, None] != history[None]
        alike = verdicts.flatten()[:, None] == verdicts.flatten()[None]
        if bool((apart & alike).any()) and bool((apart & ~alike).any()):
            same.append(float(cosines[apart & alike].mean()))
            different.append(float(cosines[apart & ~alike].mean()))
    if not same:
        return None

    def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
        return bootstrap(values, seed=seed, draws=num_resamples)

    return VerdictCosines(
        same=estimate(same), different=estimate(different), gap=estimate(np.subtract(same, different))
    )
