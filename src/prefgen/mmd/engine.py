"""One evaluation on one process: choose a backend, run it, put value and gradients together."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from prefgen.mmd.assemble import assemble_gradients, assemble_value
from prefgen.mmd.dense import BlockOptions, dense_pass
from prefgen.mmd.dispatch import Choice, choose, log_once
from prefgen.mmd.form import make_form
from prefgen.mmd.gemm import matmul_precision
from prefgen.mmd.kernels import make_levels
from prefgen.mmd.moments import centre
from prefgen.mmd.native import NativePass, fits_native
from prefgen.mmd.small import fits_small, small_pass
from prefgen.mmd.spec import Spec
from prefgen.mmd.tiled import Problem, TiledPass

Outcome = tuple[Tensor, Tensor | None, Tensor | None]


def evaluate(
    x: Tensor, y: Tensor, wx: Tensor | None, wy: Tensor | None, sigma: Tensor, coefs: Tensor, *, spec: Spec
) -> Outcome:
    """(4,) float64 value, xx, yy, xy; gradients in the dtypes of x and y, None where not needed."""
    choice = choose(
        device=x.device,
        dtype=x.dtype,
        rows=(x.shape[0], y.shape[0]),
        width=x.shape[1],
        spec=spec,
        blocks=spec.blocks,
    )
    log_once(choice)
    # Switching autocast off takes time that a small problem feels, so only where it is on.
    casting = torch.is_autocast_enabled(x.device.type)
    plain = torch.autocast(x.device.type, enabled=False) if casting else contextlib.nullcontext()
    with torch.no_grad(), plain, matmul_precision(choice.precision, device=x.device):
        value, grad_x, grad_y = _run(x.detach(), y.detach(), wx, wy, sigma, coefs, spec=spec, choice=choice)
    return value, _cast(grad_x, x), _cast(grad_y, y)


def _cast(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(like.dtype).contiguous()


def _run(
    x: Tensor,
    y: Tensor,
    wx: Tensor | None,
    wy: Tensor | None,
    sigma: Tensor,
    coefs: Tensor,
    *,
    spec: Spec,
    choice: Choice,
) -> Outcome:
    if choice.backend == "dense":
        return _run_blocks(x, y, wx, wy, sigma, coefs, spec=spec)
    if (
        choice.backend == "tiled"
        and spec.backend == "auto"
        and not spec.tile
        and fits_small(x, y, wx, wy, kernel=spec.kernel, estimator=spec.estimator, levels=sigma.shape[0])
    ):
        value, grad = small_pass(
            x, y, sigma, coefs, chain=spec.chain, unbiased=spec.estimator == "unbiased", terms=spec.terms,
            need_x=spec.need_x, need_y=spec.need_y,
        )  # fmt: skip
        if grad is None:
            return value, None, None
        n = x.shape[0]
        return value, grad[:n] if spec.need_x else None, grad[n:] if spec.need_y else None
    problem = make_problem(x, y, wx, wy, sigma, coefs, spec=spec)
    sums = make_pass(problem, choice=choice).run()
    value = assemble_value(problem, sums.terms)
    return value, *assemble_gradients(problem, sums)


def _run_blocks(
    x: Tensor, y: Tensor, wx: Tensor | None, wy: Tensor | None, sigma: Tensor, coefs: Tensor, *, spec: Spec
) -> Outcome:
    count = spec.blocks or 1
    options = BlockOptions(
        kernel=spec.kernel, alpha=spec.alpha, chain=spec.chain, estimator=spec.estimator, terms=spec.terms,
        need_x=spec.need_x, need_y=spec.need_y,
    )  # fmt: skip
    value, grad_x, grad_y = dense_pass(
        x.reshape(count, -1, x.shape[1]), y.reshape(count, -1, y.shape[1]),
        None if wx is None else wx.reshape(count, -1), None if wy is None else wy.reshape(count, -1),
        sigma, coefs, options=options,
    )  # fmt: skip
    return (
        value,
        None if grad_x is None else grad_x.reshape(x.shape),
        None if grad_y is None else grad_y.reshape(y.shape),
    )


def make_problem(
    x: Tensor,
    y: Tensor,
    wx: Tensor | None,
    wy: Tensor | None,
    sigma: Tensor,
    coefs: Tensor,
    *,
    spec: Spec,
    own_x: slice | None = None,
    own_y: slice | None = None,
) -> Problem:
    """Centre the data and put the constants together; no host synchronisation."""
    data = centre(x, y, wx=wx, wy=wy)
    form = make_form(
        x.shape[0], y.shape[0], wx=wx, wy=wy, estimator=spec.estimator, terms=spec.terms, device=x.device
    )
    return Problem(
        data=data,
        form=form,
        levels=make_levels(
            spec.kernel, sigma, coefs, alpha=spec.alpha, typical=data.typical, chain=spec.chain
        ),
        at_zero=torch.zeros_like(coefs[0]) if spec.kernel == "energy" else coefs.sum(),
        kernel=spec.kernel,
        alpha=spec.alpha,
        chain=spec.chain,
        need_x=spec.need_x,
        need_y=spec.need_y,
        own_x=own_x,
        own_y=own_y,
    )


def make_pass(problem: Problem, *, choice: Choice) -> TiledPass:
    """The pass that a choice of backend stands for."""
    if choice.backend == "triton":
        from prefgen.mmd.triton_pass import TritonPass

        return TritonPass(problem, tile=choice.tile, precision=choice.precision)
    if fits_native(problem):
        return NativePass(problem, tile=choice.tile)
    return TiledPass(problem, tile=choice.tile)
