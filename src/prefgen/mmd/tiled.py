"""One pass over tiles: value and gradient together, each symmetric tile once, memory flat in N.

Per tile: inner products (a GEMM), kernel values and slopes ``g = k'(q)`` (epilogue.py), then ``g @ rows``
into the gradient. With ``r_i = sum_j g_ij`` the gradient is ``r_i x_i - sum_j g_ij z_j``, in the centred
coordinates of moments.py. A rank of several passes its own rows only (``own_x``, ``own_y``): it then visits
every pair whose gradient falls on them, and the value of every pair exactly once over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefgen.mmd.epilogue import pair_values
from prefgen.mmd.form import Form
from prefgen.mmd.gemm import dots, subtract_product
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
        own_x: rows of x this process answers for; None for all. Likewise own_y.
        own_y: see own_x.
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
    own_x: slice | None = None
    own_y: slice | None = None


@dataclass(kw_only=True)
class Side:
    """One set during the pass: its rows, and where their gradient is collected.

    Attributes:
        rows: (N, D) centred.
        weights: (N,) or None.
        grad: (N, D) accumulator of ``-sum g_ij x_j + sum g_ij y_j``, None when not wanted.
        own: (N,) float64 row sums of g over the set's own pairs.
        cross: (N,) float64 row sums of g over the pairs with the other set.
    """

    rows: Tensor
    weights: Tensor | None
    wanted: bool
    grad: Tensor | None = field(init=False)
    own: Tensor = field(init=False)
    cross: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.grad = torch.zeros_like(self.rows) if self.wanted else None
        self.own = torch.zeros(self.rows.shape[0], dtype=torch.float64, device=self.rows.device)
        self.cross = torch.zeros_like(self.own)


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What the tiles add up to: (3,) float64 sums of centred kernel values, and the two sides."""

    terms: Tensor
    x: Side
    y: Side


def blocks(start: int, stop: int, tile: int) -> Iterator[slice]:
    """Slices of at most ``tile`` rows, as equal as possible: a last sliver would waste a GEMM."""
    count = stop - start
    pieces = -(-count // tile)
    for piece in range(pieces):
        yield slice(start + count * piece // pieces, start + count * (piece + 1) // pieces)


@dataclass(frozen=True, kw_only=True)
class TileTask:
    """One tile: rows ``i`` of one side against rows ``j`` of another.

    Attributes:
        term: 0, 1, 2 for xx, yy, xy.
        i: rows of the left side.
        j: rows of the right side.
        hollow: the pairs on the diagonal of the tile do not count.
        times: how often the value counts: 2 for a symmetric tile visited once, 0 where another rank counts
            it.
        to_left: gradient to the left side is wanted; likewise to_right.
        to_right: see to_left.
    """

    term: int
    i: slice
    j: slice
    hollow: bool
    times: float
    to_left: bool
    to_right: bool


def tile_tasks(problem: Problem, tile: int) -> Iterator[TileTask]:
    """The tiles of a problem in a fixed order."""
    form = problem.form
    own_x, own_y = problem.own_x or slice(0, form.n), problem.own_y or slice(0, form.m)
    for term, own, count, wanted in ((0, own_x, form.n, problem.need_x), (1, own_y, form.m, problem.need_y)):
        if form.active[term]:
            yield from _own_tasks(term, own, count, tile, wanted=wanted)
    if form.active[2]:
        yield from _cross_tasks(problem, own_x, own_y, tile)


def _own_tasks(term: int, own: slice, count: int, tile: int, *, wanted: bool) -> Iterator[TileTask]:
    mine = list(blocks(own.start, own.stop, tile))
    others = [*blocks(0, own.start, tile), *blocks(own.stop, count, tile)]
    for first, i in enumerate(mine):
        for j in mine[first:]:
            same = i == j
            yield TileTask(
                term=term, i=i, j=j, hollow=same, times=1.0 if same else 2.0, to_left=wanted,
                to_right=wanted and not same,
            )  # fmt: skip
        for j in others:
            yield TileTask(term=term, i=i, j=j, hollow=False, times=1.0, to_left=wanted, to_right=False)


def _cross_tasks(problem: Problem, own_x: slice, own_y: slice, tile: int) -> Iterator[TileTask]:
    form, hollow = problem.form, not problem.form.cross_diagonal
    mine_y = list(blocks(own_y.start, own_y.stop, tile))
    others_y = [*blocks(0, own_y.start, tile), *blocks(own_y.stop, form.m, tile)]
    for i in blocks(own_x.start, own_x.stop, tile):
        for j in (*mine_y, *others_y):
            yield TileTask(
                term=2, i=i, j=j, hollow=hollow and i == j, times=1.0, to_left=problem.need_x,
                to_right=problem.need_y and own_y.start <= j.start < own_y.stop,
            )  # fmt: skip
    if problem.need_y:
        for i in (*blocks(0, own_x.start, tile), *blocks(own_x.stop, form.n, tile)):
            for j in mine_y:
                yield TileTask(term=2, i=i, j=j, hollow=False, times=0.0, to_left=False, to_right=True)


class TiledPass:
    """Runs the tiles of one problem in plain torch, on any device, without a host synchronisation."""

    def __init__(self, problem: Problem, *, tile: int) -> None:
        self.problem = problem
        self.tile = tile
        self.table = problem.levels.table()
        data, form = problem.data, problem.form
        self.terms = torch.zeros(3, dtype=torch.float64, device=data.x.device)
        self.x = Side(rows=data.x, weights=form.wx, wanted=problem.need_x)
        self.y = Side(rows=data.y, weights=form.wy, wanted=problem.need_y)
        # The slope is used as 4 * scale * weight * weight * g; uniform weights go into the same factor.
        even_x = 1.0 / form.n if form.wx is None else 1.0
        even_y = 1.0 / form.m if form.wy is None else 1.0
        self.even = (even_x * even_x, even_y * even_y, even_x * even_y)

    def run(self) -> Sums:
        """All tiles of the active terms."""
        data = self.problem.data
        sides = (
            (self.x, self.x, data.norm_x, data.norm_x),
            (self.y, self.y, data.norm_y, data.norm_y),
            (self.x, self.y, data.cross_x, data.cross_y),
        )
        for task in tile_tasks(self.problem, self.tile):
            self.visit(task, *sides[task.term])
        return Sums(terms=self.terms, x=self.x, y=self.y)

    def visit(self, task: TileTask, left: Side, right: Side, row: Tensor, column: Tensor) -> None:
        """One tile: value into ``terms``, gradient into the sides."""
        i, j = task.i, task.j
        slopes = task.to_left or task.to_right
        values, gains = pair_values(
            dots(left.rows[i], right.rows[j]), row[i], column[j], self.table,
            kernel=self.problem.kernel, alpha=self.problem.alpha, chain=self.problem.chain, slopes=slopes,
        )  # fmt: skip
        if task.hollow:
            values.diagonal().zero_()
        if left.weights is not None:
            values *= left.weights[i].to(values.dtype)[:, None]
        if right.weights is not None:
            values *= right.weights[j].to(values.dtype)[None, :]
        # Row sums in the working precision are pairwise, hence accurate; only their sum needs float64.
        self.terms[task.term] += values.sum(1).sum(dtype=torch.float64) * (self.even[task.term] * task.times)
        if gains is not None:
            self.collect(task, left, right, self._weighted(task, gains, left, right))

    def _weighted(self, task: TileTask, gains: Tensor, left: Side, right: Side) -> Tensor:
        if task.hollow:
            gains.diagonal().zero_()
        factor = 4.0 * self.problem.form.scale[task.term] * self.even[task.term]
        if left.weights is not None:
            gains *= (left.weights[task.i] * factor).to(gains.dtype)[:, None]
        else:
            gains *= factor.to(gains.dtype)
        if right.weights is not None:
            gains *= right.weights[task.j].to(gains.dtype)[None, :]
        return gains

    def collect(self, task: TileTask, left: Side, right: Side, gains: Tensor) -> None:
        """Row sums and products of the slopes of one tile."""
        if task.to_left:
            (left.cross if task.term == 2 else left.own)[task.i] += gains.sum(1)
        if task.to_right:
            (right.cross if task.term == 2 else right.own)[task.j] += gains.sum(0)
        self.multiply(task, left, right, gains)

    def multiply(self, task: TileTask, left: Side, right: Side, gains: Tensor) -> None:
        """The two GEMMs of the gradient; pairs of the two sets enter with the opposite sign."""
        sign = -1.0 if task.term == 2 else 1.0
        if task.to_left and left.grad is not None:
            subtract_product(left.grad[task.i], gains, right.rows[task.j], sign=sign)
        if task.to_right and right.grad is not None:
            subtract_product(right.grad[task.j], gains.T, left.rows[task.i], sign=sign)
