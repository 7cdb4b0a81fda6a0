"""From the sums of a backend to the value and the gradients: the constant parts, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from prefgen.mmd.tiled import Problem, Sums


def assemble_value(problem: Problem, sums: Sums) -> Tensor:
    """(4,) float64: MMD^2 (or the chosen terms of it), then the true xx, yy, xy means it is made of.

    The value is put together from the CENTRED terms: their constants cancel exactly when the weights sum
    to 1, and are added back as ``constant * mass`` otherwise.
    """
    form, constant = problem.form, problem.levels.constant
    # The tiles leave i = j out of xx and yy; its kernel value is known without rounding.
    own = form.diagonal * (problem.at_zero - constant)
    centred = sums.terms * form.scale
    centred = centred + torch.cat((own, torch.zeros_like(own[:1])))
    mass = form.mass[0] + form.mass[1] - 2.0 * form.mass[2]
    value = centred[0] + centred[1] - 2.0 * centred[2] + constant * mass
    return torch.cat((value.reshape(1), centred + constant * form.mass))


def assemble_gradients(problem: Problem, sums: Sums) -> tuple[Tensor | None, Tensor | None]:
    """(N, D) and (M, D) gradients in the compute dtype; the accumulators of ``sums`` are used up."""
    data, form = problem.data, problem.form
    slope = 4.0 * problem.levels.constant_slope
    wx, wy = _weights(form.wx, form.n, data.gap), _weights(form.wy, form.m, data.gap)
    mean_x, mean_y = _weighted_sum(data.x, form.wx), _weighted_sum(data.y, form.wy)
    scale_x, scale_y, cross = form.scale.unbind()
    grad_x = grad_y = None
    if sums.x is not None:
        # Constant slope: w_i [ s (W x~_i - X) - c (V (x~_i + gap) - Y) ].
        along = sums.row_x + slope * wx * (scale_x * form.sum_x - cross * form.sum_y)
        fixed = -scale_x * mean_x - cross * (form.sum_y * data.gap - mean_y)
        grad_x = _finish(sums.x, data.x, along, wx * slope, fixed, -sums.cross_x, data.gap)
        if not form.cross_diagonal:
            away = data.x - data.y + data.gap.to(data.x.dtype)
            grad_x.addcmul_((slope * cross * wx * wx).to(grad_x.dtype)[:, None], away)
    if sums.y is not None:
        along = sums.row_y + slope * wy * (scale_y * form.sum_y - cross * form.sum_x)
        fixed = -scale_y * mean_y + cross * (form.sum_x * data.gap + mean_x)
        grad_y = _finish(sums.y, data.y, along, wy * slope, fixed, sums.cross_y, data.gap)
        if not form.cross_diagonal:
            away = data.x - data.y + data.gap.to(data.x.dtype)
            grad_y.addcmul_((slope * cross * wx * wx).to(grad_y.dtype)[:, None], away, value=-1.0)
    return grad_x, grad_y


def _finish(
    total: Tensor, rows: Tensor, along: Tensor, weight: Tensor, fixed: Tensor, cross: Tensor, gap: Tensor
) -> Tensor:
    work = total.dtype
    total.addcmul_(along.to(work)[:, None], rows)
    left = torch.stack((weight, cross), dim=1).to(work)
    return total.addmm_(left, torch.stack((fixed, gap)).to(work))


def _weights(weights: Tensor | None, count: int, like: Tensor) -> Tensor:
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64, device=like.device)
    return weights


def _weighted_sum(rows: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return rows.mean(0, dtype=torch.float64)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part, weight in zip(rows.split(1024), weights.split(1024), strict=True):
        total = total + weight @ part.double()
    return total
