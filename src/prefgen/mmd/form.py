"""The estimator as a quadratic form: which pairs count, and by how much.

Every estimator here is ``cx sum a_ij k(x_i, x_j) + cy sum b_ij k(y_i, y_j) - 2 cc sum c_ij k(x_i, y_j)`` with
``a_ij = w_i w_j`` (without i = j for the unbiased ones), so a backend needs weights, scales and flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from prefgen.mmd.errors import MMDError

Estimator = Literal["biased", "unbiased", "ustat", "block", "linear"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)

Terms = tuple[float, float, float]
ALL_TERMS: Terms = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Form:
    """Weights and scales of one MMD^2, float64 on the device of the data.

    Attributes:
        wx: (N,) normalised weights, None for 1/N each.
        wy: (M,).
        sum_x: 0-dim, sum of wx.
        sum_y: 0-dim.
        scale: (3,) factors of the xx, yy and xy sums; 0 switches a term off (also in ``active``).
        diagonal: (2,) sum of squared weights if i = j counts in xx (yy), else 0.
        mass: (3,) sum of all coefficients of each term, scales included.
        active: which of xx, yy, xy are wanted at all; host side, so no work is spent on the others.
        cross_diagonal: False leaves pairs (x_i, y_i) out (ustat).
        n: number of rows of x, likewise m of y.
        m: see n.
    """

    wx: Tensor | None
    wy: Tensor | None
    sum_x: Tensor
    sum_y: Tensor
    scale: Tensor
    diagonal: Tensor
    mass: Tensor
    active: tuple[bool, bool, bool]
    cross_diagonal: bool
    n: int
    m: int


def check_counts(n: int, m: int, *, estimator: str) -> None:
    """Refuse sample sizes an estimator is not defined for, from shapes alone.

    Raises:
        MMDError: too few rows, or unequal counts where pairs are needed.
    """
    if estimator not in ESTIMATORS:
        raise MMDError(f"estimator: {estimator!r} is not one of {', '.join(ESTIMATORS)}")
    least = 1 if estimator == "biased" else 2
    if n < least or m < least:
        raise MMDError(f"estimator={estimator!r} needs at least {least} rows on each side, got {n} and {m}")
    if estimator in ("ustat", "linear") and n != m:
        raise MMDError(f"estimator={estimator!r} pairs the rows and needs equal counts, got {n} and {m}")


def normalise(weights: Tensor | None, *, count: int, name: str, normalize: bool) -> Tensor | None:
    """Weights as float64 that sum to 1 (unless ``normalize`` is off).

    Raises:
        MMDError: wrong shape, a gradient is wanted for them, or (CPU) negative, not finite, or summing to 0.
    """
    if weights is None:
        return None
    if weights.shape != (count,):
        raise MMDError(f"{name}: shape {tuple(weights.shape)} does not match {count} rows")
    if weights.requires_grad:
        raise MMDError(f"{name}: gradients with respect to weights are not computed; pass {name}.detach()")
    wide = weights.double()
    if not normalize:
        return wide
    if wide.device.type == "cpu" and type(wide) is Tensor and not torch.compiler.is_compiling():
        least, total = wide.min().item(), wide.sum().item()
        if least < 0 or total == 0:
            raise MMDError(
                f"{name}: normalised weights must not be negative or all 0 (least {least:g}, sum {total:g}); "
                "for a signed measure pass normalize=False"
            )
    return wide / wide.sum()


def make_form(
    n: int,
    m: int,
    *,
    wx: Tensor | None,
    wy: Tensor | None,
    estimator: str,
    terms: Terms,
    device: torch.device,
) -> Form:
    """Scales of one estimator ("biased", "unbiased" or "ustat") from normalised weights."""
    sum_x, square_x = _sums(wx, count=n, device=device)
    sum_y, square_y = _sums(wy, count=m, device=device)
    sum_xy = sum_x * sum_y
    if estimator == "biased":
        own = torch.ones(2, dtype=torch.float64, device=device)
        cross = torch.ones((), dtype=torch.float64, device=device)
        diagonal = torch.stack((square_x, square_y))
        mass = torch.stack((sum_x.square(), sum_y.square(), sum_xy))
    else:
        own = torch.stack((1.0 / (1.0 - square_x), 1.0 / (1.0 - square_y)))
        paired = estimator == "ustat"
        cross = own[0] if paired else torch.ones((), dtype=torch.float64, device=device)
        diagonal = torch.zeros(2, dtype=torch.float64, device=device)
        mass = torch.ones(3, dtype=torch.float64, device=device)
    factor = torch.tensor(terms, dtype=torch.float64).to(device)
    return Form(
        wx=wx,
        wy=wy,
        sum_x=sum_x,
        sum_y=sum_y,
        scale=torch.stack((own[0], own[1], cross)) * factor,
        diagonal=diagonal * factor[:2],
        mass=mass * factor,
        active=(terms[0] != 0, terms[1] != 0, terms[2] != 0),
        cross_diagonal=estimator != "ustat",
        n=n,
        m=m,
    )


def _sums(weights: Tensor | None, *, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if weights is None:
        one = torch.ones((), dtype=torch.float64, device=device)
        return one, one / count
    return weights.sum(), weights.square().sum()
