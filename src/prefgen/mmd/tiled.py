"""One pass over tiles: value and gradient together, each symmetric tile once, memory flat in N.

Per tile: inner products (a GEMM), kernel values and slopes ``g = k'(q)`` (epilogue.py), then ``g @ rows``
into the gradient accumulators. With ``r_i = sum_j g_ij`` the gradient of ``sum_ij g_ij``-type sums is
``r_i x_i - sum_j g_ij z_j``, in the centred coordinates of moments.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefgen.mmd.epilogue import pair_values
from prefgen.mmd.form import Form
from prefgen.mmd.kernels import Levels
from prefgen.mmd.moments import Centred


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything a backend needs, already on the device.

    Attributes:
        data: centred rows and norms.
        form: weights and scales.
        levels: the mixture.
        at_zero: 0-dim float64, the uncentred kernel at distance 0.
        kernel: one of KERNELS.
        alpha: exponent of rq.
        chain: levels are squares of one another.
        need_x: the gradient by x is wanted; likewise need_y.
        need_y: see need_x.
    """

    data: Centred
    form: Form
    levels: Levels
    at_zero: Tensor
    kernel: str
    alpha: float
    chain: bool
    need_x: bool
    need_y: bool


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What the tiles add up to.

    Attributes:
        terms: (3,) float64 sums of centred kernel values over xx, yy, xy, weights in, scales not.
        x: (N, D) ``-sum_j g_ij x_j + sum_j g_ij y_j``, or None.
        y: (M, D) likewise.
        row_x: (N,) float64 sums of g over xx minus those over xy.
        row_y: (M,).
        cross_x: (N,) float64 sums of g over xy only.
        cross_y: (M,).
    """

    terms: Tensor
    x: Tensor | None
    y: Tensor | None
    row_x: Tensor
    row_y: Tensor
    cross_x: Tensor
    cross_y: Tensor


def blocks(count: int, tile: int) -> Iterator[slice]:
    """Consecutive slices of at most ``tile`` rows, as equal as possible: a last sliver would waste a GEMM."""
    pieces = max(1, -(-count // tile))
    for piece in range(pieces):
        yield slice(count * piece // pieces, count * (piece + 1) // pieces)


class TiledPass:
    """Runs the tiles of one problem in plain torch."""

    def __init__(self, problem: Problem, *, tile: int) -> None:
        self.problem = problem
        self.tile = tile
        self.table = problem.levels.table()
        data, form = problem.data, problem.form
        device = data.x.device
        self.terms = torch.zeros(3, dtype=torch.float64, device=device)
        self.grad_x = torch.zeros_like(data.x) if problem.need_x else None
        self.grad_y = torch.zeros_like(data.y) if problem.need_y else None
        self.rows = {
            name: torch.zeros(size, dtype=torch.float64, device=device)
            for name, size in (("row_x", form.n), ("row_y", form.m), ("cross_x", form.n), ("cross_y", form.m))
        }
        # The slope is used as 4 * scale * weight * weight * g; uniform weights go into the same factor.
        even_x = 1.0 / form.n if form.wx is None else 1.0
        even_y = 1.0 / form.m if form.wy is None else 1.0
        self.even = (even_x * even_x, even_y * even_y, even_x * even_y)

    def run(self) -> Sums:
        """All tiles of the active terms."""
        data, form = self.problem.data, self.problem.form
        if form.active[0]:
            self._own(0, data.x, data.norm_x, form.wx, self.grad_x, "row_x")
        if form.active[1]:
            self._own(1, data.y, data.norm_y, form.wy, self.grad_y, "row_y")
        if form.active[2]:
            self._cross()
        rows = self.rows
        return Sums(
            terms=self.terms,
            x=self.grad_x,
            y=self.grad_y,
            row_x=rows["row_x"] - rows["cross_x"],
            row_y=rows["row_y"] - rows["cross_y"],
            cross_x=rows["cross_x"],
            cross_y=rows["cross_y"],
        )

    def _own(
        self, term: int, z: Tensor, norms: Tensor, weights: Tensor | None, grad: Tensor | None, name: str
    ) -> None:
        parts = list(blocks(z.shape[0], self.tile))
        for first, i in enumerate(parts):
            for j in parts[first:]:
                same = i == j
                total, gains = self._pair(
                    z[i],
                    z[j],
                    norms[i],
                    norms[j],
                    weights,
                    weights,
                    i,
                    j,
                    term,
                    slopes=grad is not None,
                    hollow=same,
                )
                self.terms[term] += total if same else 2.0 * total
                if grad is None or gains is None:
                    continue
                self.rows[name][i] += gains.sum(1)
                grad[i].addmm_(gains, z[j], alpha=-1.0)
                if not same:
                    self.rows[name][j] += gains.sum(0)
                    grad[j].addmm_(gains.T, z[i], alpha=-1.0)

    def _cross(self) -> None:
        data, form = self.problem.data, self.problem.form
        slopes = self.grad_x is not None or self.grad_y is not None
        for i in blocks(form.n, self.tile):
            for j in blocks(form.m, self.tile):
                total, gains = self._pair(
                    data.x[i], data.y[j], data.cross_x[i], data.cross_y[j], form.wx, form.wy, i, j, 2,
                    slopes=slopes, hollow=not form.cross_diagonal and i == j,
                )  # fmt: skip
                self.terms[2] += total
                if gains is None:
                    continue
                if self.grad_x is not None:
                    self.rows["cross_x"][i] += gains.sum(1)
                    self.grad_x[i].addmm_(gains, data.y[j])
                if self.grad_y is not None:
                    self.rows["cross_y"][j] += gains.sum(0)
                    self.grad_y[j].addmm_(gains.T, data.x[i])

    def _pair(
        self,
        a: Tensor,
        b: Tensor,
        row: Tensor,
        column: Tensor,
        wa: Tensor | None,
        wb: Tensor | None,
        i: slice,
        j: slice,
        term: int,
        *,
        slopes: bool,
        hollow: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Weighted sum of the values of one tile, and its weighted, scaled slopes."""
        problem = self.problem
        values, gains = pair_values(
            a @ b.T, row, column, self.table,
            kernel=problem.kernel, alpha=problem.alpha, chain=problem.chain, slopes=slopes,
        )  # fmt: skip
        if hollow:
            values.diagonal().zero_()
            if gains is not None:
                gains.diagonal().zero_()
        work = values.dtype
        for weights, axis, part in ((wa, 1, i), (wb, 0, j)):
            if weights is not None:
                factor = weights[part].to(work).unsqueeze(axis)
                values *= factor
                gains = gains * factor if gains is not None else None
        if gains is not None:
            gains = gains * (4.0 * problem.form.scale[term] * self.even[term]).to(work)
        # Row sums in the working precision are pairwise, hence accurate; only their sum needs float64.
        return values.sum(1).sum(dtype=torch.float64) * self.even[term], gains
