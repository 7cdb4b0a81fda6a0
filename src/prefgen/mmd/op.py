"""The differentiable operator: ``prefgen::mmd2`` for torch.compile, a plain autograd Function otherwise.

Both give the value and the gradients in one forward pass; backward only multiplies them. A second
derivative does not exist and is refused. The registered operator costs some 0.1 ms a call, which small
problems feel, so eager code takes the Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefgen.mmd.engine import Outcome, evaluate
from prefgen.mmd.spec import Spec


@torch.library.custom_op("prefgen::mmd2", mutates_args=())
def mmd2_op(
    x: Tensor,
    y: Tensor,
    wx: Tensor | None,
    wy: Tensor | None,
    sigma: Tensor,
    coefs: Tensor,
    kernel: str,
    alpha: float,
    chain: bool,
    estimator: str,
    terms: list[float],
    blocks: int,
    precision: str,
    backend: str,
    tile: int,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(4,) float64 value, xx, yy, xy; gradients by x and y, of no rows where not needed."""
    spec = Spec(
        kernel=kernel, alpha=alpha, chain=chain, estimator=estimator, terms=(terms[0], terms[1], terms[2]),
        blocks=blocks, precision=precision, backend=backend, tile=tile, need_x=need_x, need_y=need_y,
    )  # fmt: skip
    value, grad_x, grad_y = evaluate(x, y, wx, wy, sigma, coefs, spec=spec)
    return value, _output(grad_x, x), _output(grad_y, y)


def _output(grad: Tensor | None, like: Tensor) -> Tensor:
    if grad is None:
        return like.new_empty((0, like.shape[1]))
    # An operator's outputs must not share memory; the small path cuts both gradients from one tensor.
    return grad.clone() if grad.untyped_storage().nbytes() != grad.numel() * grad.element_size() else grad


@mmd2_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    wx: Tensor | None,
    wy: Tensor | None,
    sigma: Tensor,
    coefs: Tensor,
    kernel: str,
    alpha: float,
    chain: bool,
    estimator: str,
    terms: list[float],
    blocks: int,
    precision: str,
    backend: str,
    tile: int,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # Contiguous whatever the strides of the inputs, as the real operator returns them.
    grad_x = x.new_empty((x.shape[0] if need_x else 0, x.shape[1]))
    grad_y = y.new_empty((y.shape[0] if need_y else 0, y.shape[1]))
    return x.new_empty((4,), dtype=torch.float64), grad_x, grad_y


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad_x, grad_y = output
    ctx.need_x, ctx.need_y = inputs[-2], inputs[-1]
    ctx.save_for_backward(grad_x, grad_y)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 15
    if grad is None:
        return (None, None, *nothing)
    grad_x, grad_y = ctx.saved_tensors
    # Only the first entry, the value, carries a gradient: the means behind it are for reports.
    factor = grad[0]
    return (
        grad_x * factor.to(grad_x.dtype) if ctx.need_x else None,
        grad_y * factor.to(grad_y.dtype) if ctx.need_y else None,
        *nothing,
    )


mmd2_op.register_autograd(_backward, setup_context=_setup)


class Eager(torch.autograd.Function):
    """The operator without the registry: ``run(need_x, need_y)`` gives value and gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, run: Callable[[bool, bool], Outcome], recompute: bool
    ) -> Tensor:
        """(4,) float64; only the first entry is differentiable."""
        need_x, need_y = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        ctx.recompute, ctx.run = recompute, run
        if recompute:
            # The inputs are kept by the closure; saving them lets autograd notice changes in place.
            ctx.save_for_backward(x, y)
            return run(False, False)[0]
        value, grad_x, grad_y = run(need_x, need_y)
        ctx.save_for_backward(grad_x, grad_y)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Saved (or recomputed) gradients times the upstream factor."""
        if ctx.recompute:
            assert len(ctx.saved_tensors) == 2
            _, grad_x, grad_y = ctx.run(ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        else:
            grad_x, grad_y = ctx.saved_tensors
        factor = grad[0]
        return (
            None if grad_x is None else grad_x * factor.to(grad_x.dtype),
            None if grad_y is None else grad_y * factor.to(grad_y.dtype),
            None,
            None,
        )


def apply_mmd2(
    x: Tensor,
    y: Tensor,
    wx: Tensor | None,
    wy: Tensor | None,
    sigma: Tensor,
    coefs: Tensor,
    *,
    spec: Spec,
    recompute: bool = False,
) -> Tensor:
    """(4,) float64 value, xx, yy, xy; the value is differentiable by x and y."""
    tracking = torch.is_grad_enabled()
    need_x, need_y = tracking and x.requires_grad, tracking and y.requires_grad
    if torch.compiler.is_compiling() and not recompute:
        out, _, _ = mmd2_op(
            x, y, wx, wy, sigma, coefs, spec.kernel, spec.alpha, spec.chain, spec.estimator, list(spec.terms),
            spec.blocks, spec.precision, spec.backend, spec.tile, need_x, need_y,
        )  # fmt: skip
        result: Tensor = out
        return result

    def run(wants_x: bool, wants_y: bool) -> Outcome:
        return evaluate(x, y, wx, wy, sigma, coefs, spec=spec.with_needs(need_x=wants_x, need_y=wants_y))

    if not (need_x or need_y):
        return run(False, False)[0]
    value: Tensor = Eager.apply(x, y, run, recompute)  # type: ignore[no-untyped-call]
    return value
