"""From a tile of inner products to kernel values and slopes, in plain torch: the path every device has.

Both outputs are centred (see kernels.py). Only the gaussian mixture whose sigmas form a geometric row of
ratio sqrt(2) needs a single transcendental: ``expm1(2t) = expm1(t) (expm1(t) + 2)`` loses nothing, while
squaring ``exp`` would lose a digit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pair_values(
    dots: Tensor,
    row: Tensor,
    column: Tensor,
    table: Tensor,
    *,
    kernel: str,
    alpha: float,
    chain: bool,
    slopes: bool,
) -> tuple[Tensor, Tensor | None]:
    """Centred kernel values and slopes of a tile.

    Args:
        dots: (..., I, J) inner products, overwritten.
        row: (..., I) float64 squared norms of the rows, column: (..., J); ``q = row + column - 2 dots``.
        column: see row.
        table: (4, L) float64, Levels.table().
        kernel: one of KERNELS.
        alpha: exponent of rq.
        chain: the levels are squares of one another and share an origin.
        slopes: whether derivatives by q are wanted.

    Returns:
        (..., I, J) values, and slopes or None.
    """
    if kernel == "gaussian":
        return _gaussian(dots, row, column, table, chain=chain, slopes=slopes)
    squared = _squared(dots, row, column)
    if kernel in ("laplacian", "energy"):
        return _radial(squared, row, column, table, kernel=kernel, slopes=slopes)
    return _rational(squared, table, exponent=0.5 if kernel == "imq" else alpha, slopes=slopes)


def _squared(dots: Tensor, row: Tensor, column: Tensor) -> Tensor:
    work = dots.dtype
    return (
        dots.mul_(-2.0).add_(row.to(work)[..., :, None]).add_(column.to(work)[..., None, :]).clamp_min_(0.0)
    )


def _gaussian(
    dots: Tensor, row: Tensor, column: Tensor, table: Tensor, *, chain: bool, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    rate, origin, value, slope = table.unbind(0)
    work = dots.dtype
    values: Tensor | None = None
    gains: Tensor | None = None
    step = dots
    for level in range(table.shape[1]):
        if chain and level:
            step = torch.mul(step, step + 2.0)
        else:
            # rate * (origin - q), each half shifted by half the origin: small numbers, rounded once.
            half = 0.5 * origin[level]
            step = torch.mul(dots, (2.0 * rate[level]).to(work))
            step += (rate[level] * (half - row)).to(work)[..., :, None]
            step += (rate[level] * (half - column)).to(work)[..., None, :]
            step.expm1_()
        values = _add(values, step, value[level].to(work))
        gains = _add(gains, step, slope[level].to(work)) if slopes else None
    assert values is not None
    return values, gains


def _add(total: Tensor | None, step: Tensor, factor: Tensor) -> Tensor:
    return step * factor if total is None else total.addcmul_(step, factor)


def _radial(
    squared: Tensor, row: Tensor, column: Tensor, table: Tensor, *, kernel: str, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    work = squared.dtype
    limit = 8.0 * torch.finfo(work).eps
    together = squared < limit * (row.abs().to(work)[..., :, None] + column.abs().to(work)[..., None, :])
    squared = squared.masked_fill(together, 0.0)
    root = squared.sqrt()
    # 1 / (2 r), and 0 where the points coincide: a kink, whose symmetric derivative is 0.
    inverse = torch.where(together, 0.0, 0.5 / torch.where(together, 1.0, root))
    values: Tensor | None = None
    gains: Tensor | None = None
    for rate, origin, value, slope in table.to(work).unbind(1):
        away = (squared - origin) / (root + origin.sqrt()).clamp_min(torch.finfo(work).tiny)
        if kernel == "energy":
            coefficient = 2.0 * slope * origin.sqrt()
            level_value, derivative = away * coefficient, inverse * coefficient
        else:
            decay = torch.expm1(-rate * away)
            level_value = decay * value
            derivative = -(decay + 1.0) * (rate * value) * inverse
        values = level_value if values is None else values + level_value
        if slopes:
            gains = derivative - slope if gains is None else gains + derivative - slope
    assert values is not None
    return values, gains


def _rational(
    squared: Tensor, table: Tensor, *, exponent: float, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    work = squared.dtype
    values: Tensor | None = None
    gains: Tensor | None = None
    for rate, origin, value, slope in table.to(work).unbind(1):
        ratio = rate * (squared - origin) / (1.0 + rate * origin)
        log = torch.log1p(ratio)
        level_value = torch.expm1(log * -exponent) * value
        values = level_value if values is None else values + level_value
        if slopes:
            derivative = torch.expm1(log * -(exponent + 1.0)) * slope
            gains = derivative if gains is None else gains + derivative
    assert values is not None
    return values, gains
