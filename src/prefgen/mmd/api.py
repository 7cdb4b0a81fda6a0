"""The functions users call: ``mmd2`` and what follows from it at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from prefgen.mmd.across import Gathered, apply_across, gather_rows
from prefgen.mmd.bandwidth import Bandwidth, resolve_mixture
from prefgen.mmd.errors import MMDError
from prefgen.mmd.form import ALL_TERMS, Estimator, check_counts, normalise
from prefgen.mmd.kernels import KernelName, check_kernel
from prefgen.mmd.moments import compute_dtype
from prefgen.mmd.op import apply_mmd2
from prefgen.mmd.spec import Backend, Precision, Spec


class MMDTerms(NamedTuple):
    """The three means of MMD^2 = xx + yy - 2 xy, each 0-dim and differentiable."""

    xx: Tensor
    yy: Tensor
    xy: Tensor


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
    return_terms: Literal[True],
) -> MMDTerms: ...
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

    ``sum_ij w_i w_j k(x_i, x_j) + sum_ij v_i v_j k(y_i, y_j) - 2 sum_ij w_i v_j k(x_i, y_j)``, weights 1/N
    and 1/M unless given. 0 for equal distributions; the scale depends on kernel and bandwidth, so compare
    only values computed with the same ones. "biased" is never negative (up to rounding). "unbiased" is
    right on average and therefore negative about half the time when the distributions agree: report it as
    it is, never clamp a loss.

    Args:
        x: (N, D) any floating dtype, any strides. Computed in float32 (float64 for float64).
        y: (M, D).
        kernel: see kernels.py for formulas; a mixture over the bandwidths.
        bandwidth: sigma in the units of the data (to_sigma converts other conventions), several of them, a
            tensor, or "mean" / "median" of the distances in this batch (no gradient flows through it).
        multipliers: factors on each sigma; None means DEFAULT_MULTIPLIERS for "mean" and "median" and 1 for
            numbers.
        coefs: weights of the mixture: "mean" (1/L), "sum" (1 each) or numbers.
        alpha: exponent of the rq kernel.
        estimator: "biased" (V-statistic), "unbiased" (U-statistic, i = j left out of xx and yy), "ustat" (N
            = M, pairs (x_i, y_i) left out too), "block" (mean of "unbiased" over blocks of consecutive rows),
            "linear" (blocks of 2 with "ustat": Gretton et al. 2012, Lemma 14; an odd last row is left out).
        wx: (N,) weights, no gradient; wy: (M,).
        wy: see wx.
        normalize: divide the weights by their sum. False allows signed measures of any mass (biased only).
        block_size: rows per block, or (rows of x, rows of y).
        yy: a cached yy term, for a y that does not change; y must not require a gradient.
        precision: of GEMM operands on a GPU: "ieee", "tf32x3", "tf32", "bf16"; "auto" is tf32x3 for a loss
            and ieee for a value without gradient. A CPU always computes exactly.
        backend: "auto", "tiled", "dense" or "triton"; see dispatch.py.
        tile: rows of a tile; None for the backend's own choice.
        grad: "with_loss" computes the gradient in the forward pass (fastest); "recompute" in backward, so
            nothing is kept in between.
        group: ranks whose rows form one global batch; every rank gets the global value and the gradient of
            its own rows. None for this process alone.
        grad_reduce: how the trainer joins parameter gradients: "mean" (DDP, FSDP) or "sum".
        return_terms: give (xx, yy, xy), so that attraction and repulsion can be weighted differently.

    Returns:
        0-dim float32 (float64 for float64), or MMDTerms.

    Raises:
        MMDError: (also a ValueError) shapes, dtypes, weights, names or sample sizes do not fit.
    """
    check_kernel(kernel, alpha=alpha)
    _check_rows(x, y)
    _check_choices(estimator=estimator, normalize=normalize, grad=grad, grad_reduce=grad_reduce)
    if estimator == "ustat" and wy is not None:
        raise MMDError("estimator='ustat' weighs pairs: pass wx alone")
    left = right = None
    if group is not None:
        left, right = gather_rows(x, group=group), gather_rows(y, group=group)
        wx = None if wx is None else gather_rows(wx, group=group).rows
        wy = None if wy is None else gather_rows(wy, group=group).rows
        if estimator == "ustat" and left.sizes != right.sizes:
            raise MMDError("estimator='ustat' needs as many rows of x as of y on every rank")
    all_x, all_y = (x, y) if left is None or right is None else (left.rows, right.rows)
    check_counts(all_x.shape[0], all_y.shape[0], estimator=estimator)
    if estimator == "ustat":
        wy = wx
    weight_x = normalise(wx, count=all_x.shape[0], name="wx", normalize=normalize)
    weight_y = normalise(wy, count=all_y.shape[0], name="wy", normalize=normalize)
    mixture = resolve_mixture(all_x, all_y, bandwidth=bandwidth, multipliers=multipliers, coefs=coefs)
    blocks = 0
    if estimator in ("block", "linear"):
        x, y, blocks = _cut(x, y, (2, 2) if estimator == "linear" else block_size)
        weight_x, weight_y = _per_block(weight_x, blocks, x), _per_block(weight_y, blocks, y)
    kind = {"block": "unbiased", "linear": "ustat"}.get(estimator, estimator)
    spec = Spec(
        kernel=kernel, alpha=float(alpha), chain=mixture.chain, estimator=kind, terms=ALL_TERMS,
        blocks=blocks, precision=precision, backend=backend, tile=tile or 0,
    )  # fmt: skip

    def run(work: Spec) -> Tensor:
        if group is None or left is None or right is None:
            return apply_mmd2(
                x,
                y,
                weight_x,
                weight_y,
                mixture.sigma,
                mixture.coefs,
                spec=work,
                recompute=grad == "recompute",
            )[0]
        return apply_across(
            x, y, left, right, weight_x, weight_y, mixture.sigma, mixture.coefs, spec=work,
            recompute=grad == "recompute", group=group,
            factor=float(dist.get_world_size(group)) if grad_reduce == "mean" else 1.0,
        )[0]  # fmt: skip

    dtype = compute_dtype(torch.promote_types(x.dtype, y.dtype))
    if return_terms:
        # value = cx xx + cy yy - 2 cc xy: each term alone, at its own share of the work.
        alone = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -0.5))
        return MMDTerms(*(run(spec.with_terms(*terms)).to(dtype) for terms in alone))
    if yy is None:
        return run(spec).to(dtype)
    if y.requires_grad or blocks:
        raise MMDError("yy: a cached term needs a y without gradient and an estimator without blocks")
    return (run(spec.with_terms(1.0, 0.0, 1.0)) + yy).to(dtype)


def mmd(x: Tensor, y: Tensor, *, eps: float = 1e-12, **options: object) -> Tensor:
    """``sqrt(max(mmd2, 0) + eps)``: the distance itself, whose gradient would be infinite at 0 without eps.

    Args:
        x: (N, D).
        y: (M, D).
        eps: added under the root.
        options: as for :func:`mmd2` (not ``return_terms``).

    Returns:
        0-dim, in the units of the kernel's feature space.
    """
    value: Tensor = mmd2(x, y, **options)  # type: ignore[call-overload]
    return (value.clamp_min(0.0) + eps).sqrt()


def cmmd(x: Tensor, y: Tensor, *, estimator: Estimator = "biased", **options: object) -> Tensor:
    """CMMD of Jayasumana et al. 2024 (arXiv 2401.09603): ``1000 mmd2`` of unit rows, sigma 10.

    The paper's formula and its code are the biased estimator, whatever the abstract says; that is the
    default here.

    Args:
        x: (N, D) image embeddings of any norm (CLIP ViT-L/14-336 in the paper).
        y: (M, D).
        estimator: see :func:`mmd2`.
        options: as for :func:`mmd2`.

    Returns:
        0-dim.
    """
    wide = torch.promote_types(compute_dtype(x.dtype), compute_dtype(y.dtype))
    unit_x, unit_y = (torch.nn.functional.normalize(z.to(wide), dim=1, eps=1e-12) for z in (x, y))
    value: Tensor = mmd2(unit_x, unit_y, bandwidth=10.0, estimator=estimator, **options)  # type: ignore[call-overload]
    return 1000.0 * value


def _check_rows(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise MMDError(
            f"x and y must be (N, D) and (M, D) with one D; got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not (x.is_floating_point() and y.is_floating_point()):
        raise MMDError(f"x and y must be floating point, got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise MMDError(f"x is on {x.device} and y on {y.device}; move one of them")


def _check_choices(*, estimator: str, normalize: bool, grad: str, grad_reduce: str) -> None:
    if not normalize and estimator != "biased":
        raise MMDError(f"normalize=False (signed measures) is defined for 'biased' only, not {estimator!r}")
    if grad not in ("with_loss", "recompute"):
        raise MMDError(f"grad: {grad!r} is neither 'with_loss' nor 'recompute'")
    if grad_reduce not in ("mean", "sum"):
        raise MMDError(f"grad_reduce: {grad_reduce!r} is neither 'mean' nor 'sum'")


def _cut(x: Tensor, y: Tensor, block_size: int | tuple[int, int] | None) -> tuple[Tensor, Tensor, int]:
    """Rows that fill whole blocks, and how many blocks they fill."""
    if block_size is None:
        raise MMDError("estimator='block' needs block_size=rows per block, or (rows of x, rows of y)")
    first, second = (block_size, block_size) if isinstance(block_size, int) else block_size
    if first < 2 or second < 2:
        raise MMDError(f"block_size: at least 2 rows a block, got {block_size}")
    if (first, second) == (2, 2):
        x, y = x[: x.shape[0] // 2 * 2], y[: y.shape[0] // 2 * 2]
    if x.shape[0] % first or y.shape[0] % second or x.shape[0] // first != y.shape[0] // second:
        raise MMDError(
            f"block_size={block_size} does not cut {x.shape[0]} and {y.shape[0]} rows into as many blocks"
        )
    return x, y, x.shape[0] // first


def _per_block(weights: Tensor | None, blocks: int, rows: Tensor) -> Tensor | None:
    """Weights that sum to 1 within each block: every block is a sample of its own."""
    if weights is None:
        return None
    if weights.shape[0] != rows.shape[0]:
        raise MMDError("weights across ranks are not supported with blocks, nor an odd row with 'linear'")
    cut = weights.reshape(blocks, -1)
    return (cut / cut.sum(1, keepdim=True)).reshape(-1)


__all__ = ["Gathered", "MMDTerms", "cmmd", "mmd", "mmd2"]
