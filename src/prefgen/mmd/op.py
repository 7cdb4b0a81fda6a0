"""The differentiable operator ``prefgen::mmd2``: value and gradients in one forward pass.

Registered with ``torch.library`` so that ``torch.compile`` keeps one graph and fake tensors have shapes. The
gradients are outputs of the operator; backward only multiplies them. A second derivative is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefgen.mmd.assemble import assemble_gradients, assemble_value
from prefgen.mmd.errors import MMDError
from prefgen.mmd.form import make_form
from prefgen.mmd.kernels import make_levels
from prefgen.mmd.moments import centre
from prefgen.mmd.tiled import Problem, TiledPass

DEFAULT_TILE = 512


def make_problem(
    x: Tensor,
    y: Tensor,
    wx: Tensor | None,
    wy: Tensor | None,
    sigma: Tensor,
    coefs: Tensor,
    *,
    kernel: str,
    alpha: float,
    chain: bool,
    estimator: str,
    terms: list[float],
    need_x: bool,
    need_y: bool,
) -> Problem:
    """Centre the data and put the constants together; no host synchronisation."""
    data = centre(x.detach(), y.detach(), wx=wx, wy=wy)
    form = make_form(
        x.shape[0], y.shape[0], wx=wx, wy=wy, estimator=estimator, terms=(terms[0], terms[1], terms[2]),
        device=x.device,
    )  # fmt: skip
    return Problem(
        data=data,
        form=form,
        levels=make_levels(kernel, sigma, coefs, alpha=alpha, typical=data.typical, chain=chain),
        at_zero=torch.zeros_like(coefs[0]) if kernel == "energy" else coefs.sum(),
        kernel=kernel,
        alpha=alpha,
        chain=chain,
        need_x=need_x,
        need_y=need_y,
    )


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
    precision: str,
    backend: str,
    tile: int,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(4,) float64 value, xx, yy, xy; gradients by x and y, of no rows where not needed."""
    problem = make_problem(
        x, y, wx, wy, sigma, coefs, kernel=kernel, alpha=alpha, chain=chain, estimator=estimator, terms=terms,
        need_x=need_x, need_y=need_y,
    )  # fmt: skip
    sums = TiledPass(problem, tile=tile or DEFAULT_TILE).run()
    value = assemble_value(problem, sums)
    grad_x, grad_y = assemble_gradients(problem, sums)
    return value, _output(grad_x, x), _output(grad_y, y)


def _output(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty((0, like.shape[1])) if grad is None else grad.to(like.dtype)


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
    nothing = (None,) * 14
    if grad is None:
        return (None, None, *nothing)
    if torch.is_grad_enabled() and grad.requires_grad:
        raise MMDError("mmd2 has no second derivative; detach the loss or drop create_graph=True")
    grad_x, grad_y = ctx.saved_tensors
    # Only the first entry, the value, carries a gradient: the means behind it are for reports.
    factor = grad[0]
    return (
        grad_x * factor.to(grad_x.dtype) if ctx.need_x else None,
        grad_y * factor.to(grad_y.dtype) if ctx.need_y else None,
        *nothing,
    )


mmd2_op.register_autograd(_backward, setup_context=_setup)
