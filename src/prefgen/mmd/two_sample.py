"""The permutation test: are two samples drawn from one distribution? One pass over the kernel matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefgen.mmd.bandwidth import Bandwidth, resolve_mixture
from prefgen.mmd.errors import MMDError
from prefgen.mmd.form import check_counts
from prefgen.mmd.gemm import dots
from prefgen.mmd.kernels import KernelName, check_kernel, make_levels
from prefgen.mmd.moments import compute_dtype, mean_rows, shift_rows
from prefgen.mmd.pairs import PairValues
from prefgen.mmd.tiled import blocks


@dataclass(frozen=True, kw_only=True)
class TestResult:
    """Outcome of :func:`mmd_test`.

    Attributes:
        statistic: unbiased MMD^2 of the two samples.
        p_value: (1 + permutations at least as extreme) / (1 + permutations): exact level for any sample size.
        std: standard error of the statistic when the distributions differ (first-order, from the same pass).
        null_quantile: 95 % quantile of the permuted statistics.
        permutations: how many.
    """

    __test__ = False  # not a pytest class

    statistic: float
    p_value: float
    std: float
    null_quantile: float
    permutations: int


class PermutationSums:
    """Collects, tile by tile of the pooled kernel matrix, what every permutation's statistic needs.

    With the 0/1 column ``b`` of a permutation the sum over its x-block is ``b' K b``, and the other two
    blocks follow from ``K 1``: one product per symmetric tile for all permutations together.

    Args:
        labels: (P + 1, n) bool or float, 1 where a pooled row belongs to x; row 0 is the true split.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        count, rows = labels.shape
        self.inside = torch.zeros(count, dtype=torch.float64, device=labels.device)
        self.row = torch.zeros(rows, dtype=torch.float64, device=labels.device)
        self.row_x = torch.zeros_like(self.row)

    def add(self, values: Tensor, i: slice, j: slice) -> None:
        """One tile (I, J), hollow on the diagonal; tiles below it are not visited."""
        left, right = (self.labels[:, part].to(values.dtype) for part in (i, j))
        product = dots(right.contiguous(), values)
        inside = (product * left).sum(1).double()
        self.inside += inside if i == j else 2.0 * inside
        self.row[i] += values.sum(1)
        self.row_x[i] += product[0]
        if i != j:
            self.row[j] += values.sum(0)
            self.row_x[j] += left[0] @ values

    def result(self) -> TestResult:
        """All statistics from the sums."""
        size = self.labels.shape[1]
        n = int(self.labels[0].sum().item())
        m = size - n
        total = self.row.sum()
        along = self.labels.double() @ self.row
        inside, cross = self.inside, along - self.inside
        outside = total - 2.0 * along + inside
        statistics = inside / (n * (n - 1)) + outside / (m * (m - 1)) - 2.0 * cross / (n * m)
        own = statistics[0]
        # A permutation equal to the true split gives the same number up to rounding and has to count.
        slack = 1e-6 * statistics.abs().max()
        extreme = int((statistics[1:] >= own - slack).sum().item())
        permutations = len(statistics) - 1
        is_x = self.labels[0] > 0.5
        row_y = self.row - self.row_x
        witness_x = (self.row_x / (n - 1) - row_y / m)[is_x]
        witness_y = (row_y / (m - 1) - self.row_x / n)[~is_x]
        variance = 4.0 * (witness_x.var() / n + witness_y.var() / m)
        return TestResult(
            statistic=own.item(),
            p_value=(1 + extreme) / (1 + permutations),
            std=variance.sqrt().item(),
            null_quantile=statistics[1:].quantile(0.95).item(),
            permutations=permutations,
        )


def draw_labels(n: int, m: int, *, permutations: int, seed: int) -> Tensor:
    """(permutations + 1, n + m) float32 memberships of x; row 0 is the true split.

    A pure function of its arguments.

    Raises:
        MMDError: fewer than one permutation.
    """
    if permutations < 1:
        raise MMDError(f"permutations: at least 1 is needed, got {permutations}")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(permutations + 1, n + m)
    labels[0, :n] = 1.0
    for row in labels[1:]:
        row[torch.randperm(n + m, generator=generator)[:n]] = 1.0
    return labels


@torch.no_grad()
def mmd_test(
    x: Tensor,
    y: Tensor,
    *,
    permutations: int = 1000,
    seed: int = 0,
    kernel: KernelName = "gaussian",
    bandwidth: Bandwidth = "median",
    multipliers: Sequence[float] | None = None,
    coefs: str | Sequence[float] = "mean",
    alpha: float = 1.0,
) -> TestResult:
    """Permutation two-sample test with the unbiased MMD^2.

    The bandwidths share one kernel matrix and one set of permutations. "mean" and "median" are taken from
    the pooled sample, which does not change under permutation, so the level stays exact.

    Args:
        x: (N, D), N >= 2.
        y: (M, D), M >= 2.
        permutations: 1000 resolve p-values down to 0.001; memory 4 (N + M) bytes each.
        seed: of the permutations.
        kernel: as in mmd2, like the rest.
        bandwidth: see mmd2.
        multipliers: see mmd2.
        coefs: see mmd2.
        alpha: see mmd2.

    Raises:
        MMDError: shapes, names or counts do not fit.
    """
    check_kernel(kernel, alpha=alpha)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise MMDError(f"x and y must be (N, D) and (M, D); got {tuple(x.shape)} and {tuple(y.shape)}")
    check_counts(x.shape[0], y.shape[0], estimator="unbiased")
    mixture = resolve_mixture(x, y, bandwidth=bandwidth, multipliers=multipliers, coefs=coefs)
    dtype = compute_dtype(torch.promote_types(x.dtype, y.dtype))
    pooled = torch.cat((x.to(dtype), y.to(dtype)))
    # One mean for both: rows change sides under permutation.
    mean = mean_rows(pooled).to(dtype)
    rows, norm, _ = shift_rows(pooled, mean, torch.zeros_like(mean, dtype=torch.float64))
    levels = make_levels(
        kernel, mixture.sigma, mixture.coefs, alpha=alpha, typical=2.0 * norm.mean(), chain=mixture.chain
    )
    pairs = PairValues(levels=levels, kernel=kernel, alpha=alpha, chain=mixture.chain)
    labels = draw_labels(x.shape[0], y.shape[0], permutations=permutations, seed=seed)
    sums = PermutationSums(labels.to(device=x.device, dtype=dtype))
    parts = list(blocks(0, rows.shape[0], pairs.tile_rows(x.device)))
    for first, i in enumerate(parts):
        for j in parts[first:]:
            sums.add(pairs.tile(rows[i], rows[j], norm[i], norm[j], hollow=i == j), i, j)
    return sums.result()
