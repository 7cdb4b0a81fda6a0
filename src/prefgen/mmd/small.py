"""Small problems on the CPU: three calls into native.c and two GEMMs, instead of a hundred tensor operations.

Below some 500 rows the arithmetic takes less time than starting tensor operations does, and a tiled pass
would lose to a plain dense implementation. Same formulas as tiled.py and assemble.py, uniform weights,
gaussian kernels.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from prefgen.mmd.gemm import dots, product
from prefgen.mmd.kernels import CHAIN_REACH
from prefgen.mmd.native import MAX_LEVELS, native_status

SMALL_ROWS = 512
"""Largest N + M that is worked on as one stacked problem."""

ONE_PRODUCT_ROWS = 128
"""Largest N + M whose inner products come from one GEMM; above, a second call costs less than it saves."""


def fits_small(
    x: Tensor, y: Tensor, wx: Tensor | None, wy: Tensor | None, *, kernel: str, estimator: str, levels: int
) -> bool:
    """Whether :func:`small_pass` covers this problem."""
    return (
        x.shape[0] + y.shape[0] <= SMALL_ROWS
        and x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and type(y) in (Tensor, torch.nn.Parameter)
        and x.dtype == y.dtype == torch.float32
        and wx is None
        and wy is None
        and kernel == "gaussian"
        and estimator in ("biased", "unbiased")
        and levels <= MAX_LEVELS
        and native_status().library is not None
    )


def small_pass(
    x: Tensor,
    y: Tensor,
    sigma: Tensor,
    coefs: Tensor,
    *,
    chain: bool,
    unbiased: bool,
    terms: tuple[float, float, float],
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor | None]:
    """(4,) float64 value, xx, yy, xy; and the gradient of the stacked rows (N + M, D), or of the first N."""
    slopes = need_x or need_y
    library = native_status().library
    assert library is not None
    left, right = x.detach().contiguous(), y.detach().contiguous()
    (n, width), m = left.shape, right.shape[0]
    z = torch.empty((n + m, width))
    work = torch.empty(5 * width + 4 * (n + m), dtype=torch.float64)
    library.prefgen_mmd_prepare.restype = ctypes.c_double
    typical = library.prefgen_mmd_prepare(
        _at(left), _count(n), _at(right), _count(m), _count(width), _at(z), _at(work)
    )
    rates, origins, values, gains = _levels(sigma.tolist(), coefs.tolist(), typical=typical, chain=chain)
    correction = (n / (n - 1), m / (m - 1), 1.0) if unbiased else (1.0, 1.0, 1.0)
    scales = tuple(term * factor for term, factor in zip(terms, correction, strict=True))
    counts = (n * n, m * m, n * m)
    tables: list[float] = []
    for term, sign in enumerate((-1.0, -1.0, 1.0)):
        factor = sign * 4.0 * scales[term] / counts[term]
        tables += [*rates, *origins, *values, *(gain * factor for gain in gains)]
    packed = (ctypes.c_double * len(tables))(*tables)
    totals = (ctypes.c_double * 3)()
    tile = _inner_products(z, n=n)
    library.prefgen_mmd_small(
        _at(tile),
        _count(n),
        _count(m),
        _count(width),
        _at(work),
        packed,
        len(rates),
        int(chain),
        int(slopes),
        totals,
    )
    constant, zero = math.fsum(values), math.fsum(coefs.tolist())
    own = [0.0, 0.0, 0.0] if unbiased else [(zero - constant) / n, (zero - constant) / m, 0.0]
    means = [scales[t] * totals[t] / counts[t] + terms[t] * own[t] for t in range(3)]
    mass = terms[0] + terms[1] - 2.0 * terms[2]
    value = means[0] + means[1] - 2.0 * means[2] + constant * mass
    out = torch.tensor([value, *(means[t] + constant * terms[t] for t in range(3))], dtype=torch.float64)
    if not slopes:
        return out, None
    # A gradient by x alone needs the first rows only, and one by y alone is rare enough to pay for both.
    total = product(tile if need_y else tile[:n], z)
    even = 4.0 * math.fsum(gains)
    constants = (ctypes.c_double * 5)(even / n, even / m, *scales)
    library.prefgen_mmd_finish(
        _at(total), _at(z), _count(n), _count(m), _count(width), _at(work), constants, int(need_y)
    )
    return out, total


def _inner_products(z: Tensor, *, n: int) -> Tensor:
    """(N + M, N + M) inner products; those of y by x may be anything, native.c writes them itself."""
    if len(z) <= ONE_PRODUCT_ROWS:
        return dots(z, z)
    tile = z.new_empty(len(z), len(z))
    tile[:n] = dots(z[:n], z)
    tile[n:, n:] = dots(z[n:], z[n:])
    return tile


def _levels(
    sigmas: list[float], coefs: list[float], *, typical: float, chain: bool
) -> tuple[list[float], list[float], list[float], list[float]]:
    """kernels.make_levels for the gaussian, in Python floats."""
    rates = [0.5 / (s * s) for s in sigmas]
    fastest = max(rates)
    origins = [min(typical, CHAIN_REACH / (fastest if chain else rate)) for rate in rates]
    values = [c * math.exp(-r * o) for c, r, o in zip(coefs, rates, origins, strict=True)]
    return rates, origins, values, [-r * v for r, v in zip(rates, values, strict=True)]


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _count(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)
