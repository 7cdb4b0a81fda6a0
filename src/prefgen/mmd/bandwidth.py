"""Which sigma: explicit numbers, the mean or the median distance, and other libraries' conventions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from prefgen.mmd.errors import MMDError
from prefgen.mmd.moments import mean_rows

Bandwidth = float | Sequence[float] | Tensor | str

DEFAULT_MULTIPLIERS = (0.5, 2**-0.5, 1.0, 2**0.5, 2.0)
"""Five gaussians whose sigma doubles every second step: each is the square root of its neighbour."""

_MEDIAN_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Bandwidths and coefficients, ready for a backend.

    Attributes:
        sigma: (L,) float64 on the device of the data, descending when ``chain``.
        coefs: (L,) float64.
        chain: every sigma is 1/sqrt(2) of the one before, known without looking at the device.
    """

    sigma: Tensor
    coefs: Tensor
    chain: bool


def to_sigma(
    *,
    gamma: float | None = None,
    variance: float | None = None,
    blur: float | None = None,
    lengthscale: float | None = None,
    dan_bandwidth: float | None = None,
) -> float:
    """The sigma of ``exp(-q / (2 sigma^2))`` from another library's number. Give exactly one.

    Args:
        gamma: scikit-learn, ``exp(-gamma q)``.
        variance: sigma squared.
        blur: geomloss (its gaussian loss is HALF of MMD^2).
        lengthscale: Gaussian-process libraries; equals sigma.
        dan_bandwidth: DAN, Xlearn and their copies, ``exp(-q / bandwidth)``.

    Raises:
        MMDError: none or several given, or not positive.
    """
    named = {
        "gamma": gamma,
        "variance": variance,
        "blur": blur,
        "lengthscale": lengthscale,
        "dan_bandwidth": dan_bandwidth,
    }
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) != 1:
        raise MMDError(f"to_sigma: give exactly one of {', '.join(named)}; got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not (value > 0 and math.isfinite(value)):
        raise MMDError(f"to_sigma: {name} must be a positive finite number, got {value}")
    if name == "gamma":
        return math.sqrt(0.5 / value)
    if name == "variance":
        return math.sqrt(value)
    return math.sqrt(0.5 * value) if name == "dan_bandwidth" else float(value)


def mean_bandwidth(x: Tensor, y: Tensor) -> Tensor:
    """Root mean squared distance between two different rows of the pooled sample; O((N+M) D), no sync.

    Args:
        x: (N, D).
        y: (M, D).

    Returns:
        0-dim float64, ``sqrt(2 n / (n - 1) trace(cov))`` with n = N + M.
    """
    total = x.shape[0] + y.shape[0]
    if total < 2:
        raise MMDError("bandwidth='mean' needs two rows at least")
    if not (x.shape[0] and y.shape[0]):
        spread, _ = _spread(x if x.shape[0] else y)
        return (2.0 * spread / (total - 1)).sqrt()
    spread_x, mean_x = _spread(x)
    spread_y, mean_y = _spread(y)
    between = (mean_x - mean_y).square().sum() * (x.shape[0] * y.shape[0] / total)
    return (2.0 * (spread_x + spread_y + between) / (total - 1)).sqrt()


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    # Two passes: the mean first, then squares of what is left; E[x^2] - E[x]^2 loses everything at an offset.
    mean = mean_rows(x)
    shift = mean.to(x.dtype if x.dtype == torch.float64 else torch.float32)
    spread = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in torch.split(x, 4096):
        spread = spread + (part - shift).square().sum(dtype=torch.float64)
    return spread, mean


def median_bandwidth(x: Tensor, y: Tensor, *, rows: int = _MEDIAN_ROWS) -> Tensor:
    """Median distance between rows of an evenly spaced subsample (at most ``rows`` of each set).

    Deterministic: the subsample is a fixed function of N and M. Within 1 to 4 % of the full median at 512.

    Returns:
        0-dim float64.
    """
    pooled = torch.cat((_every(x, rows=rows), _every(y, rows=rows)))
    if pooled.shape[0] < 2:
        raise MMDError("bandwidth='median' needs two rows at least")
    work = pooled.to(torch.float64 if pooled.dtype == torch.float64 else torch.float32)
    work = work - work.mean(0)
    row, column = torch.triu_indices(len(work), len(work), 1, device=work.device).unbind()
    norms = work.square().sum(1)
    squared = torch.addmm(norms[:, None] + norms[None, :], work, work.T, alpha=-2.0)
    return squared[row, column].clamp_min(0).median().double().sqrt()


def _every(x: Tensor, *, rows: int) -> Tensor:
    count = min(rows, x.shape[0])
    index = torch.arange(count, device=x.device) * x.shape[0] // max(count, 1)
    return x.detach()[index]


def is_chain(multipliers: Sequence[float]) -> bool:
    """Whether descending sigmas each are 1/sqrt(2) of the one before."""
    ordered = sorted(multipliers, reverse=True)
    return len(ordered) > 1 and all(
        math.isclose(wide, narrow * math.sqrt(2.0), rel_tol=1e-12) for wide, narrow in pairwise(ordered)
    )


def resolve_mixture(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: Bandwidth,
    multipliers: Sequence[float] | None,
    coefs: str | Sequence[float],
) -> Mixture:
    """Bandwidths times multipliers, with coefficients, sorted so that a chain of squares can be used.

    Args:
        x: (N, D), used by "mean" and "median".
        y: (M, D).
        bandwidth: sigma, several of them, or "mean" / "median" of the distances at hand.
        multipliers: factors on each sigma; None means the default five for "mean" and "median", else 1.
        coefs: "mean" (1/L each), "sum" (1 each) or one number per bandwidth and multiplier.

    Raises:
        MMDError: a number is not positive, a name unknown, or the counts differ.
    """
    if (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not isinstance(bandwidth, (str, Tensor))
    ):
        numbers = tuple(bandwidth) if isinstance(bandwidth, Sequence) else (bandwidth,)
        shares = coefs if isinstance(coefs, str) else tuple(coefs)
        return _host_mixture(numbers, None if multipliers is None else tuple(multipliers), shares)
    return _mixture(x, y, bandwidth=bandwidth, multipliers=multipliers, coefs=coefs)


@functools.lru_cache(maxsize=64)
def _host_mixture(
    numbers: tuple[float, ...], multipliers: tuple[float, ...] | None, coefs: str | tuple[float, ...]
) -> Mixture:
    """Explicit numbers on the CPU: the same few tensors at every step of a training, so they are kept."""
    none = torch.empty(0, 1)
    return _mixture(none, none, bandwidth=numbers, multipliers=multipliers, coefs=coefs)


def _mixture(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: Bandwidth,
    multipliers: Sequence[float] | None,
    coefs: str | Sequence[float],
) -> Mixture:
    base, host = _base(x, y, bandwidth)
    if multipliers is None:
        multipliers = DEFAULT_MULTIPLIERS if isinstance(bandwidth, str) else (1.0,)
    factors = [float(value) for value in multipliers]
    if not factors or not all(value > 0 and math.isfinite(value) for value in factors):
        raise MMDError(f"multipliers: positive finite numbers are needed, got {tuple(multipliers)}")
    single = base.shape[0] == 1
    known = factors if single else [s * f for s in host for f in factors] if host else []
    weights = _coefficients(coefs, count=base.shape[0] * len(factors))
    order = sorted(range(len(weights)), key=lambda i: -known[i]) if known else list(range(len(weights)))
    scale = torch.tensor(factors, dtype=torch.float64).to(x.device)
    sigma = (base[:, None] * scale[None, :]).reshape(-1)
    if order != list(range(len(order))):
        sigma = torch.stack([sigma[i] for i in order])
    ordered = torch.tensor([weights[i] for i in order], dtype=torch.float64).to(x.device)
    return Mixture(sigma=sigma, coefs=ordered, chain=bool(known) and is_chain(known))


def _base(x: Tensor, y: Tensor, bandwidth: Bandwidth) -> tuple[Tensor, list[float]]:
    """(B,) float64 on the device, and the same numbers when the host knows them."""
    if isinstance(bandwidth, str):
        if bandwidth not in ("mean", "median"):
            raise MMDError(f"bandwidth: {bandwidth!r} is neither numbers, 'mean' nor 'median'")
        rule = mean_bandwidth if bandwidth == "mean" else median_bandwidth
        with torch.no_grad():
            sigma = rule(x.detach(), y.detach())
        # All rows equal: any sigma gives the right answer, 0 gives NaN.
        return torch.where(sigma == 0, torch.ones_like(sigma), sigma).reshape(1), []
    if isinstance(bandwidth, Tensor):
        if bandwidth.ndim > 1:
            raise MMDError(f"bandwidth: a tensor must be 0-d or 1-d, got shape {tuple(bandwidth.shape)}")
        return bandwidth.detach().to(device=x.device, dtype=torch.float64).reshape(-1), []
    numbers = [float(value) for value in bandwidth] if isinstance(bandwidth, Sequence) else [float(bandwidth)]
    if not numbers or not all(value > 0 and math.isfinite(value) for value in numbers):
        raise MMDError(f"bandwidth: sigma must be positive and finite, got {bandwidth}")
    return torch.tensor(numbers, dtype=torch.float64).to(x.device), numbers


def _coefficients(coefs: str | Sequence[float], *, count: int) -> list[float]:
    if isinstance(coefs, str):
        if coefs not in ("mean", "sum"):
            raise MMDError(f"coefs: {coefs!r} is neither 'mean', 'sum' nor numbers")
        return [1.0 / count if coefs == "mean" else 1.0] * count
    if len(coefs) != count:
        raise MMDError(f"coefs: {len(coefs)} numbers for {count} bandwidths (bandwidths x multipliers)")
    return [float(value) for value in coefs]
