"""What a mapping from ``sem_embeds`` into the text space did: who is who, spread, neighbours, readable words.

An MMD close to zero says that two clouds look alike, not that each user landed on the own text, nor that
users stayed apart. Everything here works in float64 on (N,D) tensors, is deterministic, and keeps off the
global random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_RIDGE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over users with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    num_users: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How often a user's own text is among the nearest of all candidates' texts.

    Attributes:
        recall_1: share of users whose own text is the nearest.
        recall_10: share of users whose own text is among the ten nearest.
        chance_1: what guessing gives at 1.
        chance_10: what guessing gives at 10.
    """

    recall_1: Estimate
    recall_10: Estimate
    chance_1: float
    chance_10: float


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How far apart the rows of a set are, and in how many directions.

    Attributes:
        distance: mean pairwise Euclidean distance.
        effective_rank: exp of the entropy of the covariance's normalised eigenvalues, in [1, min(N-1, D)].
    """

    distance: float
    effective_rank: float


def bootstrap(values: Sequence[float] | np.ndarray, *, seed: int, draws: int = 1000) -> Estimate:
    """Mean of one value per user with a percentile interval over resampled users.

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("bootstrap needs at least one value")
    rng = np.random.default_rng(seed)
    means = array[rng.integers(0, array.size, size=(draws, array.size))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(mean=float(array.mean()), low=float(low), high=float(high), num_users=int(array.size))


def own_hits(queries: Tensor, candidates: Tensor, *, depth: int) -> Tensor:
    """Whether candidate i is among the ``depth`` nearest of query i, by Euclidean distance.

    Users whose texts are equal cannot be told apart by anyone: among t equal distances of which f places are
    free, the own text counts f / t, which is what drawing lots among them gives on average.

    Args:
        queries: (N,D) aligned embeddings.
        candidates: (N,D) text embeddings, same order of users.
        depth: how many places count.

    Returns:
        (N,) float64 in [0, 1].
    """
    _same_rows(queries, candidates)
    distance = torch.cdist(queries.double(), candidates.double(), compute_mode="donot_use_mm_for_euclid_dist")
    own = distance.diagonal().unsqueeze(1)
    # Two spellings of one distance differ in their last bits; without a tolerance a tie becomes a lottery.
    margin = 1e-9 * own.clamp_min(1e-12)
    nearer = (distance < own - margin).sum(dim=1)
    equal = ((distance - own).abs() <= margin).sum(dim=1)
    return ((depth - nearer).double() / equal.double()).clamp(0, 1)


def retrieval(queries: Tensor, candidates: Tensor, *, seed: int) -> Retrieval:
    """Recall at 1 and at 10 of each user's own text among all users' texts, with bootstrap intervals."""
    count = len(queries)
    return Retrieval(
        recall_1=bootstrap(own_hits(queries, candidates, depth=1).numpy(), seed=seed),
        recall_10=bootstrap(own_hits(queries, candidates, depth=10).numpy(), seed=seed + 1),
        chance_1=1 / count,
        chance_10=min(1.0, 10 / count),
    )


def derangement(count: int, *, seed: int) -> list[int]:
    """A seeded permutation of ``range(count)`` that leaves nobody in place: one random cycle.

    Raises:
        ValueError: fewer than two, which no permutation can move.
    """
    if count < 2:
        raise ValueError(f"a derangement needs at least 2 users, got {count}")
    order = np.random.default_rng(seed).permutation(count)
    moved = np.empty(count, dtype=np.int64)
    moved[order] = np.roll(order, 1)
    return [int(index) for index in moved]


def spread(rows: Tensor) -> Spread:
    """Mean pairwise distance and effective rank of (N,D) rows, N >= 2."""
    centred = rows.double() - rows.double().mean(dim=0)
    distance = torch.pdist(centred).mean() if len(rows) > 1 else torch.zeros(())
    energy = torch.linalg.svdvals(centred).pow(2)
    total = energy.sum()
    if float(total) == 0:
        return Spread(distance=0.0, effective_rank=1.0)
    share = energy / total
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return Spread(distance=float(distance), effective_rank=float(entropy.exp()))


def neighbourhood_overlap(before: Tensor, after: Tensor, *, num_neighbours: int) -> float:
    """Mean share of a row's nearest neighbours that stay among its nearest; chance is k / (N-1).

    Args:
        before: (N,D1) rows.
        after: (N,D2) the same rows elsewhere.
        num_neighbours: k, cut to N-1.
    """
    _same_rows(before, after)
    count = min(num_neighbours, len(before) - 1)
    if count < 1:
        return 1.0
    masks = []
    for rows in (before, after):
        distance = torch.cdist(rows.double(), rows.double())
        distance.fill_diagonal_(float("inf"))
        nearest = distance.topk(count, largest=False).indices
        masks.append(torch.zeros_like(distance, dtype=torch.bool).scatter_(1, nearest, True))
    return float((masks[0] & masks[1]).sum(dim=1).double().mean() / count)


def separability(first: Tensor, second: Tensor, *, seed: int, folds: int = 5) -> float:
    """Held-out accuracy of a logistic probe that tells the two sets apart; .5 = it cannot.

    Row i of both sets is one user and stays in one fold: otherwise the probe could recognise the user.

    Args:
        first: (N,D) aligned embeddings.
        second: (N,D) text embeddings of the same users.
        seed: decides the folds.
        folds: number of folds, cut to N.
    """
    _same_rows(first, second)
    count = len(first)
    folds = min(folds, count)
    order = np.random.default_rng(seed).permutation(count)
    rows = torch.stack([first.double(), second.double()], dim=1)
    right, total = 0, 0
    for fold in range(folds):
        held = np.zeros(count, dtype=bool)
        held[order[fold::folds]] = True
        train, test = rows[torch.from_numpy(~held)], rows[torch.from_numpy(held)]
        labels = torch.tensor([0.0, 1.0], dtype=torch.float64)
        scores = _logistic_scores(train.flatten(0, 1), labels.repeat(len(train)), queries=test.flatten(0, 1))
        right += int(((scores > 0) == (labels.repeat(len(test)) > 0.5)).sum())
        total += len(scores)
    return right / total


def readable_attributes(
    train: Tensor, train_labels: Tensor, *, queries: Tensor, query_labels: Tensor
) -> Tensor:
    """How well each attribute can be read by a ridge probe: area under the ROC curve on unseen users.

    Args:
        train: (N,D) embeddings of training users.
        train_labels: (N,A) booleans, user likes attribute.
        queries: (M,D) embeddings of unseen users.
        query_labels: (M,A) booleans.

    Returns:
        (A,) float64; .5 is chance; NaN where either set has only one kind of user.
    """
    scores = _ridge_scores(train, train_labels.double(), queries=queries)
    areas = torch.full((train_labels.shape[1],), float("nan"), dtype=torch.float64)
    for attribute in range(train_labels.shape[1]):
        positive = query_labels[:, attribute].bool()
        seen = int(train_labels[:, attribute].sum())
        if 0 < seen < len(train) and 0 < int(positive.sum()) < len(queries):
            areas[attribute] = _area_under_curve(scores[:, attribute], positive=positive)
    return areas


def ranked_likes(scores: Tensor, *, labels: Tensor) -> Tensor:
    """How well each user's liked attributes are ranked above the user's others, ties half.

    Args:
        scores: (N,A) higher is likelier.
        labels: (N,A) booleans, user likes attribute.

    Returns:
        (N,) float64, the area under each user's ROC curve; NaN where a user likes all or none.
    """
    areas = torch.full((len(scores),), float("nan"), dtype=torch.float64)
    for user, liked in enumerate(labels.bool()):
        if 0 < int(liked.sum()) < len(liked):
            areas[user] = _area_under_curve(scores[user].double(), positive=liked)
    return areas


def _same_rows(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second) or len(first) == 0:
        raise ValueError(
            f"expected two (N,D) sets with equal N, got {tuple(first.shape)}, {tuple(second.shape)}"
        )


def _standard(train: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets by the training rows' statistics, with a constant column for the intercept."""
    train, queries = train.double(), queries.double()
    mean, scale = train.mean(dim=0), train.std(dim=0, correction=0)
    # One overall scale: blowing up coordinates that hardly move would hand the probe their rounding noise.
    scale = scale.clamp_min(1e-3 * float(scale.max())).clamp_min(1e-12)
    width = train.shape[1] ** 0.5
    parts = [
        torch.cat([(x - mean) / scale / width, torch.ones(len(x), 1).double()], dim=1)
        for x in (train, queries)
    ]
    return parts[0], parts[1]


def _ridge_scores(train: Tensor, targets: Tensor, *, queries: Tensor) -> Tensor:
    """(M,A) ridge scores; solved over users where they are fewer than coordinates (the same solution)."""
    features, wanted = (rows[:, :-1] for rows in _standard(train, queries))
    mean = targets.mean(dim=0)
    count, width = features.shape
    penalty = _RIDGE * count * torch.eye(min(count, width), dtype=torch.float64)
    scores: Tensor
    if width <= count:
        scores = wanted @ torch.linalg.solve(features.T @ features + penalty, features.T @ (targets - mean))
    else:
        dual = torch.linalg.solve(features @ features.T + penalty, targets - mean)
        scores = wanted @ (features.T @ dual)
    return scores + mean


def _logistic_scores(train: Tensor, labels: Tensor, *, queries: Tensor, steps: int = 25) -> Tensor:
    """Newton's method on the penalised logistic loss: no step size to tune, the same answer each time."""
    features, wanted = _standard(train, queries)
    width = features.shape[1]
    penalty = _RIDGE * torch.eye(width, dtype=torch.float64)
    penalty[-1, -1] = 1e-9
    weights = torch.zeros(width, dtype=torch.float64)
    for _ in range(steps):
        probability = torch.sigmoid(features @ weights)
        gradient = features.T @ (probability - labels) / len(features) + penalty @ weights
        curvature = (probability * (1 - probability)).clamp_min(1e-9).unsqueeze(1)
        step = torch.linalg.solve(features.T @ (features * curvature) / len(features) + penalty, gradient)
        weights = weights - step
        if float(step.abs().max()) < 1e-9:
            break
    scores: Tensor = wanted @ weights
    return scores


def _area_under_curve(scores: Tensor, *, positive: Tensor) -> float:
    difference = scores[positive].unsqueeze(1) - scores[~positive].unsqueeze(0)
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())
