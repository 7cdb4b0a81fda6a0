"""Kernel sums: the primitive behind the witness function, mean shift, drifting and Nystrom features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefgen.mmd.bandwidth import Bandwidth, resolve_mixture
from prefgen.mmd.errors import MMDError
from prefgen.mmd.kernels import KernelName, check_kernel, make_levels
from prefgen.mmd.moments import centre, compute_dtype, mean_rows
from prefgen.mmd.pairs import PairValues
from prefgen.mmd.tiled import blocks


class KernelSums(NamedTuple):
    """For every row of x: ``potential`` (N,) ``sum_j w_j k(x_i, y_j)``, ``weighted_sum`` (N, D) with y_j."""

    potential: Tensor
    weighted_sum: Tensor

    @property
    def weighted_mean(self) -> Tensor:
        """(N, D) kernel-weighted mean of y seen from x: one step of mean shift."""
        return self.weighted_sum / self.potential[:, None]


@torch.no_grad()
def kernel_sums(
    x: Tensor,
    y: Tensor,
    wy: Tensor | None = None,
    *,
    kernel: KernelName = "gaussian",
    bandwidth: Bandwidth = "mean",
    multipliers: Sequence[float] | None = None,
    coefs: str | Sequence[float] = "mean",
    alpha: float = 1.0,
) -> KernelSums:
    """Potentials and kernel-weighted sums of y seen from x, in one pass, memory flat in N and M.

    The witness function of x against y at points t is the difference of two potentials.

    Args:
        x: (N, D) where to look from.
        y: (M, D) what is summed.
        wy: (M,) weights of any sign and mass, used as they are; None for 1/M.
        kernel: as in mmd2, like the rest.
        bandwidth: see mmd2.
        multipliers: see mmd2.
        coefs: see mmd2.
        alpha: see mmd2.

    Returns:
        KernelSums in float32 (float64 for float64), without gradient.

    Raises:
        MMDError: shapes or names do not fit.
    """
    check_kernel(kernel, alpha=alpha)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(y):
        raise MMDError(f"x and y must be (N, D) and (M, D); got {tuple(x.shape)} and {tuple(y.shape)}")
    if wy is not None and wy.shape != (y.shape[0],):
        raise MMDError(f"wy: shape {tuple(wy.shape)} does not match {y.shape[0]} rows")
    mixture = resolve_mixture(x, y, bandwidth=bandwidth, multipliers=multipliers, coefs=coefs)
    data = centre(x, y)
    levels = make_levels(
        kernel, mixture.sigma, mixture.coefs, alpha=alpha, typical=data.typical, chain=mixture.chain
    )
    pairs = PairValues(levels=levels, kernel=kernel, alpha=alpha, chain=mixture.chain)
    dtype = compute_dtype(torch.promote_types(x.dtype, y.dtype))
    even = torch.full((y.shape[0],), 1.0 / y.shape[0], dtype=torch.float64, device=y.device)
    weights = even if wy is None else wy.double()
    potential = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    total = torch.zeros_like(data.x)
    scaled = data.y * weights.to(dtype)[:, None]
    size = pairs.tile_rows(x.device)
    for i in blocks(0, x.shape[0], size):
        for j in blocks(0, y.shape[0], size):
            values = pairs.tile(data.x[i], data.y[j], data.cross_x[i], data.cross_y[j], hollow=False)
            potential[i] += (values * weights[j].to(dtype)).sum(1)
            total[i].addmm_(values, scaled[j])
    # Undo both centrings: the kernel's constant and the mean of y.
    potential += levels.constant * weights.sum()
    total += (levels.constant * scaled.sum(0, dtype=torch.float64)).to(dtype)
    mean_y = mean_rows(y).to(dtype)
    return KernelSums(potential.to(dtype), total.addr_(potential.to(dtype), mean_y))


@torch.no_grad()
def kernel_matrix(
    x: Tensor,
    y: Tensor,
    *,
    kernel: KernelName = "gaussian",
    bandwidth: Bandwidth = "mean",
    multipliers: Sequence[float] | None = None,
    coefs: str | Sequence[float] = "mean",
    alpha: float = 1.0,
) -> Tensor:
    """The whole (N, M) kernel matrix, for sets small enough to hold it; arguments as in mmd2."""
    check_kernel(kernel, alpha=alpha)
    mixture = resolve_mixture(x, y, bandwidth=bandwidth, multipliers=multipliers, coefs=coefs)
    data = centre(x, y)
    levels = make_levels(
        kernel, mixture.sigma, mixture.coefs, alpha=alpha, typical=data.typical, chain=mixture.chain
    )
    pairs = PairValues(levels=levels, kernel=kernel, alpha=alpha, chain=mixture.chain)
    values = pairs.tile(data.x, data.y, data.cross_x, data.cross_y, hollow=False)
    return values + levels.constant.to(values.dtype)
