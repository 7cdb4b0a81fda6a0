"""Kernels as functions of the squared distance ``q``, in the centred form every backend computes.

With ``r = sqrt(q)``, ``sigma`` in the units of the data (a length, never a variance):

========== ======================================== =====================
gaussian   exp(-q / (2 sigma^2))                    characteristic
laplacian  exp(-r / sigma)                          characteristic
rq         (1 + q / (2 alpha sigma^2)) ** -alpha    characteristic
imq        (1 + q / sigma^2) ** -0.5                characteristic
energy     -r (bandwidth ignored)                   energy distance
========== ======================================== =====================

MMD does not change when a constant is subtracted from the kernel, so each backend computes
``k(q) - k(q0)`` with ``expm1`` around a typical ``q0``, and ``k'(q) - k'(q0)`` for the gradient, whose
constant part has a closed form. Without it the three means agree in their leading digits and single precision
keeps only what is left (two digits of CMMD in its own setting).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from prefgen.mmd.errors import MMDError

KernelName = Literal["gaussian", "laplacian", "rq", "imq", "energy"]
KERNELS: tuple[str, ...] = get_args(KernelName)

CHAIN_REACH = 40.0
"""Largest rate * q0: beyond it exp(rate * q0) loses digits near q = 0 and then overflows single precision."""


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The mixture, one row per bandwidth, ascending rate; float64 on the device of the data.

    Attributes:
        rate: (L,) the factor in front of ``q`` (gaussian, rq) or ``r`` (laplacian).
        origin: (L,) the squared distance the level is centred at.
        value: (L,) coefficient times kernel at the origin.
        slope: (L,) coefficient times derivative by ``q`` at the origin.
    """

    rate: Tensor
    origin: Tensor
    value: Tensor
    slope: Tensor

    def table(self) -> Tensor:
        """(4, L) float64: rate, origin, value, slope."""
        return torch.stack((self.rate, self.origin, self.value, self.slope))

    @property
    def constant(self) -> Tensor:
        """0-dim: what was subtracted from the kernel."""
        return self.value.sum()

    @property
    def constant_slope(self) -> Tensor:
        """0-dim: what was subtracted from its derivative."""
        return self.slope.sum()


def check_kernel(kernel: str, *, alpha: float) -> None:
    """Refuse unknown kernels and shapes.

    Raises:
        MMDError: the name is unknown or alpha is not positive.
    """
    if kernel not in KERNELS:
        raise MMDError(f"kernel: {kernel!r} is not one of {', '.join(KERNELS)}")
    if not alpha > 0:
        raise MMDError(f"alpha: the exponent of the rq kernel must be positive, got {alpha}")


def make_levels(
    kernel: str, sigma: Tensor, coefs: Tensor, *, alpha: float, typical: Tensor, chain: bool
) -> Levels:
    """Levels of the mixture around a typical squared distance; no host synchronisation.

    Args:
        kernel: one of KERNELS.
        sigma: (L,) float64 bandwidths, descending when ``chain``.
        coefs: (L,) float64.
        alpha: exponent of rq.
        typical: 0-dim float64, about the mean squared distance.
        chain: the levels share one origin because each is the square of the one before it.
    """
    if kernel == "gaussian":
        rate = 0.5 / sigma.square()
        reach = CHAIN_REACH / (rate.max() if chain else rate)
        origin = torch.minimum(typical, reach).expand_as(rate)
        value = coefs * torch.exp(-rate * origin)
        return Levels(rate=rate, origin=origin, value=value, slope=-rate * value)
    if kernel == "laplacian":
        rate = 1.0 / sigma
        origin = torch.minimum(typical, (CHAIN_REACH / rate).square())
        root = origin.sqrt()
        value = coefs * torch.exp(-rate * root)
        return Levels(rate=rate, origin=origin, value=value, slope=-0.5 * rate * value / _positive(root))
    if kernel == "energy":
        origin = typical.expand_as(sigma)
        root = origin.sqrt()
        return Levels(
            rate=torch.ones_like(sigma),
            origin=origin,
            value=-coefs * root,
            slope=-0.5 * coefs / _positive(root),
        )
    exponent = 0.5 if kernel == "imq" else alpha
    rate = 0.5 / (exponent * sigma.square())
    origin = typical.expand_as(rate)
    base = 1.0 + rate * origin
    value = coefs * base**-exponent
    return Levels(rate=rate, origin=origin, value=value, slope=-exponent * rate * value / base)


def _positive(root: Tensor) -> Tensor:
    # All points equal gives root 0: the slope there multiplies distances of 0, so any finite number serves.
    return torch.where(root > 0, root, torch.ones_like(root))
