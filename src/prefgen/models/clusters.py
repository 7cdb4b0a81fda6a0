"""A few groups among image embeddings: k-means on directions, and how many groups there are.

CLIP compares embeddings by their angle, so rows are brought to unit length first. Nothing here is the
paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefgen.errors import DataError

LEAST_SILHOUETTE = 0.2
"""Below it ``auto`` makes one group. Measured: the best split of 6 or 12 rows scattered around ONE direction
reaches .10 in 64 dimensions and .04 in 512, two directions as far apart as the scatter is wide .24 to .28."""

MOST_CLUSTERS = 4
"""``auto`` looks for no more."""

SMALLEST_CLUSTER = 2
"""``auto`` makes no group of fewer: one odd image is no taste of its own."""

_RESTARTS = 8
_MOST_ROUNDS = 100


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Groups of rows, the largest first.

    Attributes:
        labels: group of each row, from 0.
        silhouette: mean silhouette in [-1,1]; None for one group.
    """

    labels: tuple[int, ...]
    silhouette: float | None

    @property
    def count(self) -> int:
        """How many groups."""
        return max(self.labels) + 1

    def rows(self, cluster: int) -> list[int]:
        """The rows of one group, in order."""
        return [row for row, label in enumerate(self.labels) if label == cluster]


def find_clusters(embeds: Tensor, *, num_clusters: int | None, seed: int = 0) -> Clusters:
    """Group embeddings (N,D), N >= 1: a pure function of its arguments.

    Args:
        embeds: one row an image.
        num_clusters: how many groups; None chooses from 1 to ``MOST_CLUSTERS`` the number with the highest
            mean silhouette among those that leave no group under ``SMALLEST_CLUSTER``, and 1 where that
            silhouette is below ``LEAST_SILHOUETTE``.
        seed: of the starts.

    Raises:
        DataError: more groups than there are different rows, or fewer than 1.
    """
    rows = torch.nn.functional.normalize(embeds.double().cpu(), dim=1)
    different = len(torch.unique(rows, dim=0))
    if num_clusters is not None:
        if not 1 <= num_clusters <= different:
            raise DataError(
                f"{len(rows)} images, {different} of them different, make from 1 to {different} tastes, "
                f"got {num_clusters}"
            )
        return _clusters(rows, count=num_clusters, seed=seed)
    best = _clusters(rows, count=1, seed=seed)
    highest = LEAST_SILHOUETTE
    for count in range(2, min(MOST_CLUSTERS, different) + 1):
        found = _clusters(rows, count=count, seed=seed)
        assert found.silhouette is not None
        smallest = min(len(found.rows(cluster)) for cluster in range(count))
        if smallest >= SMALLEST_CLUSTER and found.silhouette >= highest:
            best, highest = found, found.silhouette
    return best


def silhouette(rows: Tensor, *, labels: Tensor) -> float:
    """Mean over rows (N,D) of (b - a) / max(a, b), in [-1,1].

    a is a row's mean distance to the others of its group, b that to the nearest other group; a row alone in
    its group counts 0.
    """
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    member = torch.nn.functional.one_hot(labels).to(distances)
    sizes = member.sum(dim=0)
    totals = distances @ member
    own = labels[:, None]
    inside = totals.gather(1, own)[:, 0] / (sizes[labels] - 1).clamp_min(1)
    outside = (totals / sizes).scatter(1, own, float("inf")).min(dim=1).values
    widths = (outside - inside) / torch.maximum(inside, outside).clamp_min(1e-12)
    return float(torch.where(sizes[labels] > 1, widths, 0.0).mean())


def _clusters(rows: Tensor, *, count: int, seed: int) -> Clusters:
    if count == 1:
        return Clusters(labels=(0,) * len(rows), silhouette=None)
    generator = torch.Generator().manual_seed(seed)
    best, least = None, float("inf")
    for _ in range(_RESTARTS):
        labels, spread = _kmeans(rows, centres=_start(rows, count=count, generator=generator))
        # Another start has to be better by more than rounding, or the order of sums would choose.
        if spread < least - 1e-9:
            best, least = labels, spread
    assert best is not None
    ordered = _largest_first(best, count=count)
    return Clusters(labels=tuple(ordered.tolist()), silhouette=silhouette(rows, labels=ordered))


def _start(rows: Tensor, *, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each further centre far from those before, by lot."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    while len(chosen) < count:
        # Not by matrix products: their rounding would give a row a distance to itself, and a chance.
        nearest = (rows[:, None] - rows[chosen]).square().sum(dim=2).min(dim=1).values
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
    return rows[chosen]


def _kmeans(rows: Tensor, *, centres: Tensor) -> tuple[Tensor, float]:
    """(labels (N,), sum of squared distances), Lloyd's rounds until nothing moves."""
    count, labels = len(centres), None
    for _ in range(_MOST_ROUNDS):
        squared = (rows[:, None] - centres).square().sum(dim=2)
        found = squared.argmin(dim=1)
        for cluster in range(count):
            if not bool((found == cluster).any()):
                # An empty group takes the row that fits worst among groups that can spare one.
                spare = torch.bincount(found, minlength=count)[found] > 1
                worst = squared.gather(1, found[:, None])[:, 0].where(spare, -1.0).argmax()
                found[worst] = cluster
        if labels is not None and torch.equal(found, labels):
            break
        labels = found
        centres = torch.stack([rows[labels == cluster].mean(dim=0) for cluster in range(count)])
    assert labels is not None
    return labels, float((rows - centres[labels]).square().sum())


def _largest_first(labels: Tensor, *, count: int) -> Tensor:
    """Groups numbered by size, then by their first row, so that a seed changes no names."""
    listed = labels.tolist()
    order = sorted(range(count), key=lambda cluster: (-listed.count(cluster), listed.index(cluster)))
    return torch.tensor([order.index(label) for label in listed])
