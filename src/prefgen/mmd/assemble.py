"""From the sums of a backend to the value and the gradients: the constant parts, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from prefgen.mmd.moments import mean_rows
from prefgen.mmd.tiled import Problem, Side, Sums


def assemble_value(problem: Problem, terms: Tensor) -> Tensor:
    """(4,) float64: MMD^2 (or the chosen terms of it), then the true xx, yy, xy means it is made of.

    The value is put together from the CENTRED terms: their constants cancel exactly when the weights sum
    to 1, and are added back as ``constant * mass`` otherwise.

    Args:
        problem: see tiled.py.
        terms: (3,) float64 sums of centred kernel values (over all ranks).
    """
    form, constant = problem.form, problem.levels.constant
    # The tiles leave i = j out of xx and yy; its kernel value is known without rounding.
    own = form.diagonal * (problem.at_zero - constant)
    centred = terms * form.scale
    centred = centred + torch.cat((own, torch.zeros_like(own[:1])))
    mass = form.mass[0] + form.mass[1] - 2.0 * form.mass[2]
    value = centred[0] + centred[1] - 2.0 * centred[2] + constant * mass
    return torch.cat((value.reshape(1), centred + constant * form.mass))


def assemble_gradients(problem: Problem, sums: Sums) -> tuple[Tensor | None, Tensor | None]:
    """(N, D) and (M, D) gradients in the compute dtype; the accumulators of ``sums`` are used up."""
    data, form = problem.data, problem.form
    slope = 4.0 * problem.levels.constant_slope
    mean_x, mean_y = _weighted_sum(data.x, form.wx), _weighted_sum(data.y, form.wy)
    scale_x, scale_y, cross = form.scale.unbind()
    grad_x = grad_y = None
    # Constant slope: w_i [ s (W x~_i - X) - c (V (x~_i + gap) - Y) ].
    if sums.x.grad is not None:
        wx = slope * _weights(form.wx, form.n, data.gap)
        along = sums.x.own - sums.x.cross + wx * (scale_x * form.sum_x - cross * form.sum_y)
        fixed = -scale_x * mean_x - cross * (form.sum_y * data.gap - mean_y)
        grad_x = _finish(sums.x, along, wx, fixed, -sums.x.cross, data.gap)
    if sums.y.grad is not None:
        wy = slope * _weights(form.wy, form.m, data.gap)
        along = sums.y.own - sums.y.cross + wy * (scale_y * form.sum_y - cross * form.sum_x)
        fixed = -scale_y * mean_y + cross * (form.sum_x * data.gap + mean_x)
        grad_y = _finish(sums.y, along, wy, fixed, sums.y.cross, data.gap)
    if not form.cross_diagonal and (grad_x is not None or grad_y is not None):
        # ustat leaves the pairs (x_i, y_i) out of the constant part too.
        factor = (slope * cross * _weights(form.wx, form.n, data.gap).square()).to(data.x.dtype)[:, None]
        away = factor * (data.x - data.y + data.gap.to(data.x.dtype))
        grad_x = grad_x + away if grad_x is not None else None
        grad_y = grad_y - away if grad_y is not None else None
    return grad_x, grad_y


def _finish(side: Side, along: Tensor, weight: Tensor, fixed: Tensor, cross: Tensor, gap: Tensor) -> Tensor:
    assert side.grad is not None
    total, work = side.grad, side.rows.dtype
    total.addcmul_(along.to(work)[:, None], side.rows)
    left = torch.stack((weight, cross), dim=1).to(work)
    return total.addmm_(left, torch.stack((fixed, gap)).to(work))


def _weights(weights: Tensor | None, count: int, like: Tensor) -> Tensor:
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64, device=like.device)
    return weights


def _weighted_sum(rows: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return mean_rows(rows)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part, weight in zip(torch.split(rows, 1024), torch.split(weights, 1024), strict=True):
        total = total + weight @ part.double()
    return total
