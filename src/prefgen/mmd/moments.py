"""Own-mean centring: the coordinates in which squared distances keep their digits.

Each set loses its OWN mean; a pooled mean leaves two distant clouds with norms as large as their distance.
The cross distances are put together again from the difference of means ``d``: ``|x~|^2 + 2 x~.d + |d|^2`` and
``|y~|^2 - 2 y~.d``, added in float64 and rounded once. Added in single precision a constant is rounded the
same way in every row, a bias that no averaging removes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Centred:
    """Both sets around their own means.

    Attributes:
        x: (N, D) contiguous, in the compute dtype.
        y: (M, D).
        gap: (D,) float64, mean of x minus mean of y.
        norm_x: (N,) float64, squared norms.
        norm_y: (M,) float64.
        cross_x: (N,) float64, squared norm of x~ + gap.
        cross_y: (M,) float64, squared norm of y~ minus 2 y~.gap.
        typical: 0-dim float64, about the mean squared distance over all pairs.
    """

    x: Tensor
    y: Tensor
    gap: Tensor
    norm_x: Tensor
    norm_y: Tensor
    cross_x: Tensor
    cross_y: Tensor
    typical: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Double for double; single precision for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def centre(x: Tensor, y: Tensor, *, wx: Tensor | None = None, wy: Tensor | None = None) -> Centred:
    """Subtract each set's own mean and collect squared norms; extra memory (N + M) D.

    Args:
        x: (N, D) any floating dtype, any strides.
        y: (M, D).
        wx: (N,) float64 weights, so that padding rows of weight 0 do not move the mean.
        wy: (M,).
    """
    dtype = torch.promote_types(compute_dtype(x.dtype), compute_dtype(y.dtype))
    mean_x, mean_y = _mean(x, wx, dtype=dtype), _mean(y, wy, dtype=dtype)
    gap = mean_x.double() - mean_y.double()
    xc, norm_x, along_x = shift_rows(x, mean_x, gap)
    yc, norm_y, along_y = shift_rows(y, mean_y, gap)
    far = gap.square().sum()
    spread = _average(norm_x, wx) + _average(norm_y, wy)
    return Centred(
        x=xc,
        y=yc,
        gap=gap,
        norm_x=norm_x,
        norm_y=norm_y,
        cross_x=norm_x + 2.0 * along_x + far,
        cross_y=norm_y - 2.0 * along_y,
        typical=spread + 0.5 * far,
    )


def mean_rows(rows: Tensor) -> Tensor:
    """(D,) float64 mean of (N, D) rows, in pieces: a reduction to another dtype copies its whole input."""
    if rows.shape[0] <= _ROWS:
        return rows.mean(0, dtype=torch.float64)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, _ROWS):
        total += part.sum(0, dtype=torch.float64)
    return total / rows.shape[0]


def _mean(x: Tensor, weights: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    if weights is None:
        return mean_rows(x).to(dtype)
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    size = weights.abs()
    for rows, part in zip(torch.split(x, _ROWS), torch.split(size, _ROWS), strict=True):
        total = total + part @ rows.double()
    return (total / size.sum()).to(dtype)


def _average(norms: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return norms.mean()
    size = weights.abs()
    return (norms * size).sum() / size.sum()


def shift_rows(x: Tensor, mean: Tensor, gap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred rows, their squared norms and their products with the gap, both float64."""
    out = torch.empty(x.shape, dtype=mean.dtype, device=x.device)
    norms, along = [], []
    direction = gap.to(mean.dtype)
    for rows, part in zip(torch.split(out, _ROWS), torch.split(x, _ROWS), strict=True):
        # The mean has the compute dtype, so a half-precision row is widened before anything is subtracted.
        torch.sub(part.to(mean.dtype), mean, out=rows) if not x.requires_grad else rows.copy_(part - mean)
        norms.append((rows * rows).sum(1, dtype=torch.float64))
        along.append((rows * direction).sum(1, dtype=torch.float64))
    return out, torch.cat(norms), torch.cat(along)
