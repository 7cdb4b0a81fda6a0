"""A batch of small problems at once: blocks of the block estimator, and single tiles on a GPU.

Same formulas as tiled.py and assemble.py with a leading block dimension; every block keeps its own means,
and all share one kernel origin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefgen.mmd.epilogue import pair_values
from prefgen.mmd.form import Terms
from prefgen.mmd.kernels import Levels, make_levels
from prefgen.mmd.moments import compute_dtype

_ENTRIES = 1 << 22
"""Largest number of kernel values held at once."""


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What the blocks have in common.

    Attributes:
        kernel: one of KERNELS.
        alpha: exponent of rq.
        chain: levels are squares of one another.
        estimator: "biased", "unbiased" or "ustat".
        terms: factors of xx, yy, xy.
        need_x: the gradient by x is wanted; likewise need_y.
        need_y: see need_x.
    """

    kernel: str
    alpha: float
    chain: bool
    estimator: str
    terms: Terms
    need_x: bool
    need_y: bool


def dense_pass(
    x: Tensor,
    y: Tensor,
    wx: Tensor | None,
    wy: Tensor | None,
    sigma: Tensor,
    coefs: Tensor,
    *,
    options: BlockOptions,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean over blocks.

    Args:
        x: (B, n, D).
        y: (B, m, D).
        wx: (B, n) float64 weights, or None for 1/n.
        wy: (B, m).
        sigma: (L,) float64, descending if ``options.chain``.
        coefs: (L,) float64.
        options: the rest.

    Returns:
        (4,) float64 value, xx, yy, xy; gradients (B, n, D) and (B, m, D) in the compute dtype, or None.
    """
    count, n, m = x.shape[0], x.shape[1], y.shape[1]
    step = max(1, _ENTRIES // max(n * n, m * m, n * m))
    values, grads_x, grads_y = [], [], []
    for start in range(0, count, step):
        part = slice(start, start + step)
        value, grad_x, grad_y = _chunk(
            x[part], y[part], _weights(wx, x, part), _weights(wy, y, part), sigma, coefs, options=options
        )
        values.append(value)
        grads_x.append(grad_x)
        grads_y.append(grad_y)
    total = torch.cat(values, dim=1).mean(1)
    return total, _join(grads_x, count), _join(grads_y, count)


def _join(parts: list[Tensor | None], count: int) -> Tensor | None:
    kept = [part for part in parts if part is not None]
    return torch.cat(kept).div_(count) if kept else None


def _weights(weights: Tensor | None, rows: Tensor, part: slice) -> Tensor:
    if weights is not None:
        return weights[part]
    return torch.full(rows[part].shape[:2], 1.0 / rows.shape[1], dtype=torch.float64, device=rows.device)


def _chunk(
    x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, sigma: Tensor, coefs: Tensor, *, options: BlockOptions
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = torch.promote_types(compute_dtype(x.dtype), compute_dtype(y.dtype))
    mean_x, mean_y = (z.mean(1, keepdim=True, dtype=torch.float64).to(dtype) for z in (x, y))
    xc, yc = x.to(dtype) - mean_x, y.to(dtype) - mean_y
    gap = (mean_x.double() - mean_y.double()).squeeze(1)
    norm_x, norm_y = ((z * z).sum(2, dtype=torch.float64) for z in (xc, yc))
    direction = gap.to(dtype)[:, None]
    far = gap.square().sum(1, keepdim=True)
    cross_x = norm_x + 2.0 * (xc * direction).sum(2, dtype=torch.float64) + far
    cross_y = norm_y - 2.0 * (yc * direction).sum(2, dtype=torch.float64)
    typical = norm_x.mean() + norm_y.mean() + 0.5 * far.mean()
    levels = make_levels(
        options.kernel, sigma, coefs, alpha=options.alpha, typical=typical, chain=options.chain
    )
    scale, diagonal, mass = _scales(wx, wy, estimator=options.estimator)
    sums, gains = [], []
    sides = (
        (xc, xc, norm_x, norm_x, wx, wx),
        (yc, yc, norm_y, norm_y, wy, wy),
        (xc, yc, cross_x, cross_y, wx, wy),
    )
    for term, (a, b, row, column, wa, wb) in enumerate(sides):
        value, gain = _pairs(
            a, b, row, column, wa, wb, levels, options, hollow=term < 2 or options.estimator == "ustat"
        )
        sums.append(value)
        gains.append(
            None
            if gain is None
            else gain * (4.0 * scale[term] * options.terms[term]).to(dtype)[:, None, None]
        )
    constant = levels.constant
    at_zero = torch.zeros_like(constant) if options.kernel == "energy" else coefs.sum()
    factor = torch.tensor(options.terms, dtype=torch.float64).to(x.device)[:, None]
    means = (torch.stack(sums) * scale + diagonal * (at_zero - constant)) * factor
    weight = mass * factor
    value = means[0] + means[1] - 2.0 * means[2] + constant * (weight[0] + weight[1] - 2.0 * weight[2])
    out = torch.cat((value[None], means + constant * weight))
    slope = 4.0 * levels.constant_slope
    scale = scale * factor
    grad_x = grad_y = None
    if options.need_x:
        grad_x = _gradient(
            xc, yc, gains[0], gains[2], wx, wy, scale[0], scale[2], slope, gap, options=options
        )
    if options.need_y:
        cross = None if gains[2] is None else gains[2].transpose(1, 2)
        grad_y = _gradient(yc, xc, gains[1], cross, wy, wx, scale[1], scale[2], slope, -gap, options=options)
    return out, grad_x, grad_y


def _scales(wx: Tensor, wy: Tensor, *, estimator: str) -> tuple[Tensor, Tensor, Tensor]:
    """(3, B) scales, (3, B) weight of the diagonal, (3, B) mass of the terms."""
    square_x, square_y = wx.square().sum(1), wy.square().sum(1)
    one, none = torch.ones_like(square_x), torch.zeros_like(square_x)
    if estimator == "biased":
        sum_x, sum_y = wx.sum(1), wy.sum(1)
        mass = torch.stack((sum_x.square(), sum_y.square(), sum_x * sum_y))
        return torch.stack((one, one, one)), torch.stack((square_x, square_y, none)), mass
    own_x, own_y = 1.0 / (1.0 - square_x), 1.0 / (1.0 - square_y)
    cross = own_x if estimator == "ustat" else one
    return (
        torch.stack((own_x, own_y, cross)),
        torch.zeros_like(torch.stack((one,) * 3)),
        torch.stack((one,) * 3),
    )


def _pairs(
    a: Tensor,
    b: Tensor,
    row: Tensor,
    column: Tensor,
    wa: Tensor,
    wb: Tensor,
    levels: Levels,
    options: BlockOptions,
    *,
    hollow: bool,
) -> tuple[Tensor, Tensor | None]:
    values, gains = pair_values(
        torch.bmm(a, b.transpose(1, 2)), row, column, levels.table(),
        kernel=options.kernel, alpha=options.alpha, chain=options.chain, slopes=options.need_x or
        options.need_y,
    )  # fmt: skip
    left, right = wa.to(a.dtype)[:, :, None], wb.to(a.dtype)[:, None, :]
    if hollow:
        values.diagonal(dim1=1, dim2=2).zero_()
    total = (values * left * right).sum(2).sum(1, dtype=torch.float64)
    if gains is None:
        return total, None
    if hollow:
        gains.diagonal(dim1=1, dim2=2).zero_()
    return total, gains * left * right


def _gradient(
    rows: Tensor,
    others: Tensor,
    own: Tensor | None,
    cross: Tensor | None,
    w: Tensor,
    v: Tensor,
    scale: Tensor,
    mixed: Tensor,
    slope: Tensor,
    gap: Tensor,
    *,
    options: BlockOptions,
) -> Tensor:
    """``rows`` seen from their own mean; ``gap`` is that mean minus the other one."""
    assert own is not None
    assert cross is not None
    dtype = rows.dtype
    row_cross = cross.sum(2)
    weight = slope * w
    mean_own = torch.bmm(w[:, None], rows.double()).squeeze(1)
    mean_other = torch.bmm(v[:, None], others.double()).squeeze(1)
    along = weight * (scale * w.sum(1) - mixed * v.sum(1))[:, None]
    fixed = -scale[:, None] * mean_own - mixed[:, None] * (v.sum(1)[:, None] * gap - mean_other)
    grad = (own.sum(2) - row_cross + along.to(dtype))[:, :, None] * rows
    grad += torch.bmm(cross, others) - torch.bmm(own, rows)
    grad += (
        weight.to(dtype)[:, :, None] * fixed.to(dtype)[:, None]
        - row_cross[:, :, None] * gap.to(dtype)[:, None]
    )
    if options.estimator == "ustat":
        skipped = (slope * mixed[:, None] * w.square()).to(dtype)[:, :, None]
        grad += skipped * (rows - others + gap.to(dtype)[:, None])
    return grad
