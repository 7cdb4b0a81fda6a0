"""The cached side of many comparisons: a fixed set y, with its yy term computed once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from prefgen.mmd.api import mmd2
from prefgen.mmd.bandwidth import Bandwidth, resolve_mixture
from prefgen.mmd.errors import MMDError
from prefgen.mmd.form import Estimator
from prefgen.mmd.kernels import KernelName
from prefgen.mmd.sums import kernel_matrix, kernel_sums


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A fixed sample and everything about it that does not depend on what it is compared with.

    Attributes:
        rows: (M, D) the sample, or (K, D) landmarks that stand for it.
        weights: (K,) float64 signed weights of the landmarks; None for the full sample.
        yy: the yy term of the FULL sample.
        sigma: bandwidths, multipliers applied.
        coefs: one per sigma.
        kernel: see mmd2.
        alpha: see mmd2.
        estimator: "biased" or "unbiased".
        count: M.
    """

    rows: Tensor
    weights: Tensor | None
    yy: float
    sigma: tuple[float, ...]
    coefs: tuple[float, ...]
    kernel: KernelName
    alpha: float
    estimator: Estimator
    count: int

    @staticmethod
    @torch.no_grad()
    def from_features(
        y: Tensor,
        *,
        kernel: KernelName = "gaussian",
        bandwidth: Bandwidth = "mean",
        multipliers: Sequence[float] | None = None,
        coefs: str | Sequence[float] = "mean",
        alpha: float = 1.0,
        estimator: Estimator = "biased",
        landmarks: int | None = None,
        seed: int = 0,
    ) -> Reference:
        """Compute and freeze.

        Args:
            y: (M, D).
            kernel: as in mmd2, like the next four.
            bandwidth: "mean" and "median" are taken from y alone and frozen.
            multipliers: see mmd2.
            coefs: see mmd2.
            alpha: see mmd2.
            estimator: "biased" or "unbiased".
            landmarks: keep this many rows with signed Nystrom weights instead of all.
            seed: of the choice of landmarks.

        Raises:
            MMDError: another estimator, or more landmarks than rows.
        """
        if estimator not in ("biased", "unbiased"):
            raise MMDError(f"Reference: estimator must be 'biased' or 'unbiased', got {estimator!r}")
        mixture = resolve_mixture(y, y[:0], bandwidth=bandwidth, multipliers=multipliers, coefs=coefs)
        sigma, shares = tuple(mixture.sigma.tolist()), tuple(mixture.coefs.tolist())
        terms = mmd2(
            y, y, kernel=kernel, bandwidth=list(sigma), coefs=list(shares), alpha=alpha, estimator=estimator,
            return_terms=True,
        )  # fmt: skip
        rows, weights = y.detach().contiguous(), None
        if landmarks is not None:
            rows, weights = _landmarks(
                rows, landmarks, seed=seed, sigma=sigma, coefs=shares, kernel=kernel, alpha=alpha
            )
        return Reference(
            rows=rows, weights=weights, yy=terms.yy.item(), sigma=sigma, coefs=shares, kernel=kernel,
            alpha=alpha, estimator=estimator, count=y.shape[0],
        )  # fmt: skip

    def mmd2(self, x: Tensor, *, wx: Tensor | None = None) -> Tensor:
        """MMD^2 of x (N, D) to the sample; the gradient flows to x only.

        With landmarks the attraction term is approximate and the yy term exact.
        """
        rows = self.rows.to(x.device)
        options = {
            "kernel": self.kernel,
            "bandwidth": list(self.sigma),
            "coefs": list(self.coefs),
            "alpha": self.alpha,
        }
        if self.weights is None:
            return cast(
                Tensor,
                mmd2(x, rows, estimator=self.estimator, wx=wx, yy=self.yy, **options),  # type: ignore[call-overload]
            )
        own = mmd2(
            x, x.detach()[:2].clone(), estimator=self.estimator, wx=wx, return_terms=True, **options
        ).xx  # type: ignore[call-overload]
        even = torch.full((x.shape[0],), 1.0 / x.shape[0], dtype=torch.float64, device=x.device)
        cross = mmd2(  # signed landmarks: biased form, only its xy term is used
            x, rows, wx=even if wx is None else wx.double() / wx.sum(), wy=self.weights.to(x.device),
            normalize=False, return_terms=True, **options,
        ).xy  # type: ignore[call-overload]  # fmt: skip
        return cast(Tensor, own + self.yy - 2.0 * cross)

    def tensors(self) -> dict[str, Tensor]:
        """What to save, for safetensors."""
        held = {"rows": self.rows.contiguous()}
        return held if self.weights is None else {**held, "weights": self.weights.contiguous()}

    def header(self) -> dict[str, str]:
        """The rest, as safetensors metadata."""
        fields = {
            "yy": self.yy, "sigma": self.sigma, "coefs": self.coefs, "kernel": self.kernel, "alpha":
            self.alpha, "estimator": self.estimator, "count": self.count,
        }  # fmt: skip
        return {"prefgen.mmd.reference": json.dumps(fields)}

    @staticmethod
    def rebuild(tensors: dict[str, Tensor], header: dict[str, str]) -> Reference:
        """Inverse of :meth:`tensors` and :meth:`header`.

        Raises:
            MMDError: the header is missing or torn.
        """
        try:
            fields = json.loads(header["prefgen.mmd.reference"])
            return Reference(
                rows=tensors["rows"], weights=tensors.get("weights"), yy=float(fields["yy"]),
                sigma=tuple(fields["sigma"]), coefs=tuple(fields["coefs"]), kernel=fields["kernel"],
                alpha=float(fields["alpha"]), estimator=fields["estimator"], count=int(fields["count"]),
            )  # fmt: skip
        except (KeyError, ValueError, TypeError) as error:
            raise MMDError(f"not a saved MMD reference: {error}") from error


def _landmarks(
    y: Tensor,
    count: int,
    *,
    seed: int,
    sigma: tuple[float, ...],
    coefs: tuple[float, ...],
    kernel: KernelName,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """Rows of y and signed weights whose potential is closest to y's on the span of the landmarks."""
    if not 0 < count <= y.shape[0]:
        raise MMDError(f"landmarks: between 1 and {y.shape[0]} rows can stand for the sample, got {count}")
    chosen = torch.randperm(y.shape[0], generator=torch.Generator().manual_seed(seed))[:count]
    rows = y[chosen.to(y.device)].double()
    options = {"kernel": kernel, "bandwidth": list(sigma), "coefs": list(coefs), "alpha": alpha}
    target = kernel_sums(rows, y.double(), **options).potential  # type: ignore[arg-type]
    gram = kernel_matrix(rows, rows, **options)  # type: ignore[arg-type]
    ridge = 1e-10 * gram.diagonal().abs().mean() * torch.eye(count, dtype=torch.float64, device=y.device)
    return y[chosen.to(y.device)].contiguous(), torch.linalg.solve(gram + ridge, target)
