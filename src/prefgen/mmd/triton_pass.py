"""The CUDA path: Triton pair kernel into a bounded panel, cuBLAS for the gradient products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefgen.mmd.tiled import Problem, Side, TiledPass, TileTask


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Shape of the pair kernel.

    Attributes:
        block_i: rows of a program's tile; block_j: columns; block_d: depth of one GEMM step.
        block_j: see block_i.
        block_d: see block_i.
        warps: warps per program.
        stages: pipeline depth of the loads.
    """

    block_i: int
    block_j: int
    block_d: int
    warps: int
    stages: int


def launch_for(*, capability: tuple[int, int], precision: str, width: int) -> Launch:
    """A static table by compute capability, precision and D: nothing is tuned at run time.

    Autotuning synchronises under graph capture and makes results depend on the load. The rows come from
    compiling ahead of time (spills and shared memory, see tests/mmd/test_triton_aot.py).
    """
    depth = 16 if width <= 16 else 32
    if precision == "bf16":
        return Launch(block_i=128, block_j=64, block_d=32 if width <= 32 else 64, warps=8, stages=3)
    if precision == "tf32x3":
        return Launch(block_i=64, block_j=128, block_d=depth, warps=8, stages=2)
    if precision == "ieee":
        return Launch(block_i=64, block_j=64, block_d=depth, warps=4, stages=2)
    return Launch(block_i=128, block_j=64, block_d=depth, warps=8, stages=3)


@functools.cache
def pair_kernel() -> Any:
    """The compiled kernel; imported here, because triton is optional."""
    from prefgen.mmd import triton_kernels

    return triton_kernels.pair_kernel


def round_tf32(rows: Tensor) -> Tensor:
    """Nearest TF32 value (10 mantissa bits, ties to even).

    ``tl.dot`` may truncate instead, which biases every product.
    """
    bits = rows.view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(rows.isfinite(), rounded.view(torch.float32), rows)


class TritonPass(TiledPass):
    """TiledPass whose tiles are large panels filled by the pair kernel.

    Args:
        problem: a gaussian problem in single precision.
        tile: rows and columns of the panel.
        precision: "ieee", "tf32x3", "tf32" or "bf16".
        kernel: the pair kernel; the interpreter's in tests.
        launch: overrides the table.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        tile: int,
        precision: str,
        kernel: Any = None,
        launch: Launch | None = None,
        interpreted: bool = False,
    ) -> None:
        super().__init__(problem, tile=tile)
        rows = problem.data.x
        capability = torch.cuda.get_device_capability(rows.device) if rows.device.type == "cuda" else (0, 0)
        self.kernel = kernel if kernel is not None else pair_kernel()
        self.precision = precision
        self.launch = launch or launch_for(capability=capability, precision=precision, width=rows.shape[1])
        self.interpreted = interpreted
        self.panel_dtype = torch.bfloat16 if precision == "bf16" and not interpreted else torch.float32
        self.operands = {id(self.x): self._operand(self.x.rows), id(self.y): self._operand(self.y.rows)}
        self._consistent_norms()
        rate, origin = self.table[0], self.table[1]
        shift = rate * (origin - origin[:1])
        self.constants = torch.stack((rate, self.table[2], self.table[3], shift)).float().contiguous()

    def _operand(self, rows: Tensor) -> Tensor:
        if self.precision == "bf16":
            return rows.to(torch.bfloat16)
        return round_tf32(rows) if self.precision == "tf32" else rows

    def _consistent_norms(self) -> None:
        """Squared norms of the ROUNDED operands: near-duplicates keep a distance near 0."""
        self.norms = self.problem.data
        if self.precision not in ("tf32", "bf16"):
            return
        data = self.problem.data
        rounded = [self.operands[id(side)].float() for side in (self.x, self.y)]
        norm = [(z * z).sum(1, dtype=torch.float64) for z in rounded]
        gap = data.gap.float()
        along = [(z * gap).sum(1, dtype=torch.float64) for z in (data.x, data.y)]
        far = data.gap.square().sum()
        self.norms = type(data)(
            x=data.x, y=data.y, gap=data.gap, norm_x=norm[0], norm_y=norm[1], typical=data.typical,
            cross_x=norm[0] + 2.0 * along[0] + far, cross_y=norm[1] - 2.0 * along[1],
        )  # fmt: skip

    def visit(self, task: TileTask, left: Side, right: Side, row: Tensor, column: Tensor) -> None:
        """One panel: the kernel, then two cuBLAS products."""
        norms = self.norms
        row, column = (
            (norms.norm_x, norms.norm_x), (norms.norm_y, norms.norm_y), (norms.cross_x, norms.cross_y)
        )[task.term]  # fmt: skip
        i, j = task.i, task.j
        slopes = task.to_left or task.to_right
        half = 0.5 * self.table[1, 0]
        shift_i, shift_j = ((half - part).float().contiguous() for part in (row[i], column[j]))
        factor = (4.0 * self.problem.form.scale[task.term] * self.even[task.term]).float().reshape(1)
        weighted = left.weights is not None or right.weights is not None
        weights = (self._weight(left, i), self._weight(right, j)) if weighted else (factor, factor)
        total, panel = self._pair(
            self.operands[id(left)][i], self.operands[id(right)][j], shift_i, shift_j, weights, factor,
            weighted=weighted, hollow=task.hollow, slopes=slopes,
        )  # fmt: skip
        self.terms[task.term] += total * (self.even[task.term] * task.times)
        if slopes:
            # Row sums come from the ROUNDED slopes, so that sum_j g_ij (x_i - z_j) stays consistent.
            self.collect(task, left, right, panel if panel.dtype == torch.float32 else panel.float())

    def _weight(self, side: Side, part: slice) -> Tensor:
        if side.weights is None:
            return torch.ones(part.stop - part.start, device=side.rows.device)
        return side.weights[part].float().contiguous()

    def _pair(
        self,
        a: Tensor,
        b: Tensor,
        shift_i: Tensor,
        shift_j: Tensor,
        weights: tuple[Tensor, Tensor],
        factor: Tensor,
        *,
        weighted: bool,
        hollow: bool,
        slopes: bool,
    ) -> tuple[Tensor, Tensor]:
        launch = self.launch
        grid = (-(-a.shape[0] // launch.block_i), -(-b.shape[0] // launch.block_j))
        totals = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=a.device)
        shape = (a.shape[0], b.shape[0]) if slopes else (1, 1)
        panel = torch.empty(shape, dtype=self.panel_dtype, device=a.device)
        # Said aloud, because Triton 3.10 changes the default; fused multiply-adds are what the tests
        # measured.
        options = {} if self.interpreted else {"enable_fp_fusion": True}
        start: Callable[..., None] = self.kernel[grid]
        start(
            a, b, shift_i, shift_j, weights[0], weights[1], self.constants, factor, totals, panel,
            a.shape[0], b.shape[0], a.shape[1], a.stride(0), b.stride(0), panel.stride(0),
            LEVELS=self.constants.shape[1], CHAIN=self.problem.chain, WEIGHTED=weighted, HOLLOW=hollow,
            SLOPES=slopes, PRECISION="tf32" if self.precision == "bf16" else self.precision,
            UPCAST=self.interpreted, BLOCK_I=launch.block_i, BLOCK_J=launch.block_j, BLOCK_D=launch.block_d,
            num_warps=launch.warps, num_stages=launch.stages, **options,
        )  # fmt: skip
        return totals.sum(dtype=torch.float64), panel
