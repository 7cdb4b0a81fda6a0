"""MMD of the global batch across ranks: own rows against everyone's, work shared.

MMD is not a mean over samples, so the average of per-rank values is another quantity with another gradient.
Here every rank gathers all rows (no gradient flows through the gather), visits the pairs that fall on its
own rows, and three float64 sums are added over the ranks. The gradient of a rank's own rows is then
complete: nothing is communicated in backward. DDP and FSDP average parameter gradients over the W ranks,
which ``grad_reduce="mean"`` undoes with a factor W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from prefgen.mmd.assemble import assemble_gradients, assemble_value
from prefgen.mmd.dispatch import choose, log_once
from prefgen.mmd.engine import Outcome, evaluate, make_pass, make_problem
from prefgen.mmd.gemm import matmul_precision
from prefgen.mmd.op import Eager
from prefgen.mmd.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """The rows of all ranks, in rank order.

    Attributes:
        rows: (sum of sizes, D), detached.
        own: where this rank's rows lie.
        sizes: rows of every rank.
    """

    rows: Tensor
    own: slice
    sizes: tuple[int, ...]


def gather_rows(rows: Tensor, *, group: ProcessGroup) -> Gathered:
    """All ranks' rows; the ranks may hold different numbers, also none. Synchronises once, for the sizes."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device)
    sizes = tuple(int(size) for size in _all_gather(mine, world=world, group=group).tolist())
    most = max(sizes)
    padded = rows.detach().contiguous()
    if padded.shape[0] < most:
        padded = torch.cat((padded, padded.new_zeros((most - padded.shape[0], *padded.shape[1:]))))
    stacked = _all_gather(padded, world=world, group=group)
    if any(size != most for size in sizes):
        stacked = torch.cat([stacked[r * most : r * most + size] for r, size in enumerate(sizes)])
    start = sum(sizes[:rank])
    return Gathered(rows=stacked, own=slice(start, start + sizes[rank]), sizes=sizes)


def _all_gather(tensor: Tensor, *, world: int, group: ProcessGroup) -> Tensor:
    """Stack the equal-shaped tensors of all ranks along the first dimension."""
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor, group=group)
    return torch.cat(parts)


def apply_across(
    x: Tensor,
    y: Tensor,
    left: Gathered,
    right: Gathered,
    wx: Tensor | None,
    wy: Tensor | None,
    sigma: Tensor,
    coefs: Tensor,
    *,
    spec: Spec,
    recompute: bool,
    group: ProcessGroup,
    factor: float,
) -> Tensor:
    """(4,) float64 value, xx, yy, xy of the global batch, differentiable by this rank's rows.

    Args:
        x: (N_rank, D) this rank's rows; y: (M_rank, D).
        y: see x.
        left: everyone's rows of x; right: of y.
        right: see left.
        wx: (N,) normalised weights of all rows, or None; wy: (M,).
        wy: see wx.
        sigma: (L,) float64, equal on all ranks.
        coefs: (L,).
        spec: what to compute.
        recompute: compute the gradient in backward.
        group: the ranks.
        factor: multiplies this rank's gradient: W where the trainer averages, 1 where it sums.
    """

    def run(need_x: bool, need_y: bool) -> Outcome:
        work = spec.with_needs(need_x=need_x, need_y=need_y)
        device = left.rows.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if spec.blocks:
                return _blocks(x, y, sigma, coefs, spec=work, group=group, factor=factor)
            return _rows(left, right, wx, wy, sigma, coefs, spec=work, group=group, factor=factor)

    tracking = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if not tracking:
        return run(False, False)[0]
    value: Tensor = Eager.apply(x, y, run, recompute)  # type: ignore[no-untyped-call]
    return value


def _rows(
    left: Gathered,
    right: Gathered,
    wx: Tensor | None,
    wy: Tensor | None,
    sigma: Tensor,
    coefs: Tensor,
    *,
    spec: Spec,
    group: ProcessGroup,
    factor: float,
) -> Outcome:
    x, y = left.rows, right.rows
    choice = choose(
        device=x.device, dtype=x.dtype, rows=(x.shape[0], y.shape[0]), width=x.shape[1],
        spec=spec,
    )  # fmt: skip
    log_once(choice)
    with matmul_precision(choice.precision, device=x.device):
        problem = make_problem(x, y, wx, wy, sigma, coefs, spec=spec, own_x=left.own, own_y=right.own)
        sums = make_pass(problem, choice=choice).run()
        dist.all_reduce(sums.terms, group=group)
        value = assemble_value(problem, sums.terms)
        grad_x, grad_y = assemble_gradients(problem, sums)
    return value, _own(grad_x, left, factor), _own(grad_y, right, factor)


def _own(grad: Tensor | None, side: Gathered, factor: float) -> Tensor | None:
    return None if grad is None else grad[side.own].mul(factor).to(side.rows.dtype)


def _blocks(
    x: Tensor,
    y: Tensor,
    sigma: Tensor,
    coefs: Tensor,
    *,
    spec: Spec,
    group: ProcessGroup,
    factor: float,
) -> Outcome:
    """Blocks stay on their rank: the mean over all ranks' blocks."""
    value, grad_x, grad_y = evaluate(x, y, None, None, sigma, coefs, spec=spec)
    pooled = torch.cat((value * spec.blocks, value.new_tensor([float(spec.blocks)])))
    dist.all_reduce(pooled, group=group)
    share = spec.blocks / pooled[4] * factor
    return (
        pooled[:4] / pooled[4],
        None if grad_x is None else grad_x * share.to(grad_x.dtype),
        None if grad_y is None else grad_y * share.to(grad_y.dtype),
    )
