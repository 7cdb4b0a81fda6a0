"""FID, KID and CMMD between two sets of features given from outside: whoever calls says which features.

The numbers depend on the features far more than on the formula: an FID on a small network's features is
comparable with nothing but other FIDs on the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities.data import dim_zero_cat

from prefgen.errors import DataError
from prefgen.evaluate.alignment import Estimate
from prefgen.evaluate.mmd_metric import MMDMetric


class _AsGiven(nn.Module):
    """Features instead of a network: what torchmetrics takes for its own."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, rows: Tensor) -> Tensor:
        return rows.double()


class FrechetDistance(FrechetInceptionDistance):
    """FID (arXiv 1706.08500): ``|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))`` of two sets of features, >= 0.

    torchmetrics' own, fed with features (N,D) instead of pictures, in float64: ``update(rows, real=True)``.
    Biased upwards for few rows, the more the smaller N is beside D: compare equal N only.

    Args:
        num_features: D.
    """

    def __init__(self, *, num_features: int) -> None:
        super().__init__(feature=_AsGiven(num_features))


class KernelDistance(Metric):
    """KID (arXiv 1801.01401): unbiased MMD^2 with the kernel ``(x.y / D + 1)^3``; negative values are real.

    Over all rows at once, no random subsets, and right for sets of different size (torchmetrics 1.9 divides
    by one size for both).
    """

    full_state_update = False
    higher_is_better = False
    real: list[Tensor]
    drawn: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("real", "drawn"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, rows: Tensor, *, real: bool) -> None:
        """Add (N,D) features of one side."""
        (self.real if real else self.drawn).append(rows.detach().double())

    def compute(self) -> Tensor:
        """0-dim float64.

        Raises:
            DataError: a side has fewer than two rows.
        """
        first, second = (dim_zero_cat(rows) if len(rows) else [] for rows in (self.real, self.drawn))
        if min(len(first), len(second)) < 2:
            raise DataError(f"KID needs 2 rows of each side, got {len(first)} real and {len(second)} drawn")
        return (
            _mean_off_diagonal(_cubic(first, first))
            + _mean_off_diagonal(_cubic(second, second))
            - 2 * _cubic(first, second).mean()
        )


def _cubic(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    count = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))


class CMMD(MMDMetric):
    """CMMD (arXiv 2401.09603): 1000 times the biased MMD^2 of unit rows, Gaussian kernel, sigma 10.

    The paper's features are CLIP ViT-L/14-336's image embeddings; others give other numbers.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(kernel="gaussian", bandwidth=10.0, estimator="biased", scale=1000.0, **options)

    def update(self, x: Tensor | None = None, y: Tensor | None = None) -> None:
        """Add rows (N,D) of any norm to either side, as :meth:`MMDMetric.update` does."""
        unit = [
            None if rows is None else nn.functional.normalize(rows.double(), dim=-1, eps=1e-12)
            for rows in (x, y)
        ]
        super().update(*unit)


def bootstrap_sets(
    statistic: Callable[[NDArray[np.int64]], float], *, num_users: int, seed: int, draws: int = 200
) -> Estimate:
    """A number about a whole set of users with a 95 % bootstrap interval over users.

    A resampled user stands there twice, which by itself moves every distance between sets upwards; the draws
    are therefore shifted so that their mean is the value itself (our choice), and only their spread counts.

    Args:
        statistic: from numbers of users, some of them repeatedly, to the figure of their pictures.
        num_users: U.
        seed: of the resampling.
        draws: resampled sets.

    Raises:
        ValueError: fewer than two users.
    """
    if num_users < 2:
        raise ValueError(f"resampling needs at least 2 users, got {num_users}")
    value = float(statistic(np.arange(num_users)))
    rng = np.random.default_rng(seed)
    found = np.array([statistic(rng.integers(0, num_users, num_users)) for _ in range(draws)])
    low, high = np.quantile(found - found.mean() + value, [0.025, 0.975])
    return Estimate(mean=value, low=float(low), high=float(high), num_users=num_users)
