"""What one evaluation computes: the plain choices that travel through the operator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from prefgen.mmd.form import Terms

Precision = Literal["auto", "ieee", "tf32x3", "tf32", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

Backend = Literal["auto", "tiled", "dense", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Host-side choices of one evaluation.

    Attributes:
        kernel: one of KERNELS.
        alpha: exponent of rq.
        chain: the bandwidths are squares of one another.
        estimator: "biased", "unbiased" or "ustat".
        terms: factors of xx, yy and xy.
        blocks: number of equal blocks the rows are cut into; 0 for none.
        precision: see Precision.
        backend: see Backend.
        tile: rows of a tile; 0 for the backend's own choice.
        need_x: the gradient by x is wanted; likewise need_y.
        need_y: see need_x.
    """

    kernel: str
    alpha: float
    chain: bool
    estimator: str
    terms: Terms
    blocks: int = 0
    precision: str = "auto"
    backend: str = "auto"
    tile: int = 0
    need_x: bool = False
    need_y: bool = False

    def with_terms(self, xx: float, yy: float, xy: float) -> Spec:
        """The same with other factors."""
        return replace(self, terms=(xx, yy, xy))

    def with_needs(self, *, need_x: bool, need_y: bool) -> Spec:
        """The same with other gradients."""
        return replace(self, need_x=need_x, need_y=need_y)
