"""The functions users call: ``mmd2`` and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from prefgen.mmd.bandwidth import Bandwidth, resolve_mixture
from prefgen.mmd.errors import MMDError
from prefgen.mmd.form import Estimator, check_counts, normalise
from prefgen.mmd.kernels import KernelName, check_kernel
from prefgen.mmd.op import mmd2_op

Precision = Literal["auto", "ieee", "tf32x3", "tf32", "bf16"]
Backend = Literal["auto", "tiled", "dense", "triton"]


class MMDTerms(NamedTuple):
    """The three means of MMD^2 = xx + yy - 2 xy, each 0-dim and differentiable."""

    xx: Tensor
    yy: Tensor
    xy: Tensor


@overload
def mmd2(x: Tensor, y: Tensor, *, return_terms: Literal[True], **options: object) -> MMDTerms: ...
@overload
def mmd2(
    x: Tensor,
    y: Tensor,
    *,
    kernel: KernelName = ...,
    bandwidth: Bandwidth = ...,
    multipliers: Sequence[float] | None = ...,
    coefs: str | Sequence[float] = ...,
    alpha: float = ...,
    estimator: Estimator = ...,
    wx: Tensor | None = ...,
    wy: Tensor | None = ...,
    normalize: bool = ...,
    block_size: int | tuple[int, int] | None = ...,
    yy: Tensor | float | None = ...,
    precision: Precision = ...,
    backend: Backend = ...,
    tile: int | None = ...,
    grad: Literal["with_loss", "recompute"] = ...,
    group: ProcessGroup | None = ...,
    grad_reduce: Literal["mean", "sum"] = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...
def mmd2(
    x: Tensor,
    y: Tensor,
    *,
    kernel: KernelName = "gaussian",
    bandwidth: Bandwidth = "mean",
    multipliers: Sequence[float] | None = None,
    coefs: str | Sequence[float] = "mean",
    alpha: float = 1.0,
    estimator: Estimator = "biased",
    wx: Tensor | None = None,
    wy: Tensor | None = None,
    normalize: bool = True,
    block_size: int | tuple[int, int] | None = None,
    yy: Tensor | float | None = None,
    precision: Precision = "auto",
    backend: Backend = "auto",
    tile: int | None = None,
    grad: Literal["with_loss", "recompute"] = "with_loss",
    group: ProcessGroup | None = None,
    grad_reduce: Literal["mean", "sum"] = "mean",
    return_terms: bool = False,
) -> Tensor | MMDTerms:
    """Squared maximum mean discrepancy between the rows of x and of y.

    ``MMD^2 = sum a_ij k(x_i, x_j) + sum b_ij k(y_i, y_j) - 2 sum c_ij k(x_i, y_j)``, weights summing to 1.
    """
    check_kernel(kernel, alpha=alpha)
    _check_rows(x, y)
    check_counts(x.shape[0], y.shape[0], estimator=estimator)
    left = normalise(wx, count=x.shape[0], name="wx", normalize=normalize)
    right = normalise(wy, count=y.shape[0], name="wy", normalize=normalize)
    mixture = resolve_mixture(x, y, bandwidth=bandwidth, multipliers=multipliers, coefs=coefs)
    tracking = torch.is_grad_enabled()

    def run(a: Tensor, b: Tensor, kind: str, terms: list[float]) -> Tensor:
        out, _, _ = mmd2_op(
            a, b, left, right, mixture.sigma, mixture.coefs, kernel, alpha, mixture.chain, kind, terms,
            precision, backend, tile or 0, tracking and a.requires_grad, tracking and b.requires_grad,
        )  # fmt: skip
        return out

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if estimator in ("block", "linear"):
        sizes = (2, 2) if estimator == "linear" else _block_sizes(x, y, block_size)
        kind = "ustat" if estimator == "linear" else "unbiased"
        count = x.shape[0] // sizes[0]
        values = [
            run(
                x[i * sizes[0] : (i + 1) * sizes[0]],
                y[i * sizes[1] : (i + 1) * sizes[1]],
                kind,
                [1.0, 1.0, 1.0],
            )[0]
            for i in range(count)
        ]
        return torch.stack(values).mean().to(dtype)
    if return_terms:
        return MMDTerms(
            run(x, y, estimator, [1.0, 0.0, 0.0])[0].to(dtype),
            run(x, y, estimator, [0.0, 1.0, 0.0])[0].to(dtype),
            run(x, y, estimator, [0.0, 0.0, -0.5])[0].to(dtype),
        )
    if yy is not None:
        return (run(x, y, estimator, [1.0, 0.0, 1.0])[0] + yy).to(dtype)
    return run(x, y, estimator, [1.0, 1.0, 1.0])[0].to(dtype)


def _check_rows(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise MMDError(
            f"x and y must be (N, D) and (M, D) with one D; got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not (x.is_floating_point() and y.is_floating_point()):
        raise MMDError(f"x and y must be floating point, got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise MMDError(f"x is on {x.device} and y on {y.device}; move one of them")


def _block_sizes(x: Tensor, y: Tensor, block_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if block_size is None:
        raise MMDError("estimator='block' needs block_size=rows per block, or (rows of x, rows of y)")
    first, second = (block_size, block_size) if isinstance(block_size, int) else block_size
    if first < 2 or second < 2:
        raise MMDError(f"block_size: at least 2 rows a block, got {block_size}")
    if x.shape[0] % first or y.shape[0] % second or x.shape[0] // first != y.shape[0] // second:
        raise MMDError(
            f"block_size={block_size} does not cut {x.shape[0]} and {y.shape[0]} rows into as many blocks"
        )
    return first, second
