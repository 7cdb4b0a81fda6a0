"""Random Fourier features: MMD^2 of a gaussian mixture in O((N + M) F D), an approximation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefgen.mmd.bandwidth import Bandwidth, resolve_mixture
from prefgen.mmd.errors import MMDError

_ROWS = 2048


def rff_mmd2(
    x: Tensor,
    y: Tensor,
    *,
    features: int = 8192,
    seed: int = 0,
    bandwidth: Bandwidth = "mean",
    multipliers: Sequence[float] | None = None,
    coefs: str | Sequence[float] = "mean",
) -> Tensor:
    """Biased MMD^2 approximated with random Fourier features (Rahimi and Recht 2007; Zhao and Meng 2015).

    The relative error has a standard deviation of 3 to 4 % with 1024 features and 1 to 1.5 % with 8192 (N =
    2048, D = 768). Differentiable by autograd. The frequencies of a mixture are shared out among its
    bandwidths.

    Args:
        x: (N, D).
        y: (M, D).
        features: number of frequencies F; each gives a sine and a cosine.
        seed: of the frequencies; equal seeds give equal features, so losses stay comparable.
        bandwidth: see mmd2, like the rest.
        multipliers: see mmd2.
        coefs: see mmd2.

    Returns:
        0-dim float32 (float64 for float64).

    Raises:
        MMDError: fewer frequencies than bandwidths.
    """
    mixture = resolve_mixture(x, y, bandwidth=bandwidth, multipliers=multipliers, coefs=coefs)
    levels = mixture.sigma.shape[0]
    if features < levels:
        raise MMDError(
            f"features: {features} frequencies for {levels} bandwidths; at least one each is needed"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(features, x.shape[1], generator=generator, dtype=dtype).to(x.device)
    level = torch.arange(features, device=x.device) % levels
    frequency = noise / mixture.sigma[level].to(dtype)[:, None]
    count = torch.bincount(level, minlength=levels).double()
    weight = (mixture.coefs / count)[level].to(dtype)
    gap = _means(x, frequency, dtype=dtype) - _means(y, frequency, dtype=dtype)
    return (gap.square() * weight).sum()


def _means(rows: Tensor, frequency: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(2, F) means of cosine and sine features."""
    total = torch.zeros(2, frequency.shape[0], dtype=dtype, device=rows.device)
    for part in torch.split(rows, _ROWS):
        angle = part.to(dtype) @ frequency.T
        total = total + torch.stack((angle.cos().sum(0), angle.sin().sum(0)))
    return total / rows.shape[0]
