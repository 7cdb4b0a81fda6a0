"""The Triton pair kernel: GEMM of a tile, MMD epilogue, sum of the values, slopes into a panel.

One program computes a BLOCK_I x BLOCK_J tile of ``z_a z_b^T``, turns it into centred kernel values (their
sum goes to one slot per program: no atomics, a fixed order, bitwise repeatable) and, if asked, stores the
slopes ``g`` for the cuBLAS products that follow. A fused backward with a (BLOCK, D) accumulator does not
fit registers at D >= 512, which is why the panel exists. All constants are device scalars, so the host
never waits.
"""

# Triton reads these functions as its own language: arguments are pointers and compile-time constants.
# ruff: noqa: ANN001, ANN201, D417, N803
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(t):
    """expm1 by range reduction: exact where t is small, which exp(t) - 1 is not."""
    t = tl.maximum(t, -87.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(t * 1.4426950408889634 + 0.5)
    r = t - n * 0.693145751953125
    r = r - n * 1.428606820309417e-6
    p = 1.984126984126984e-4 * r + 1.388888888888889e-3
    p = p * r + 8.333333333333333e-3
    p = p * r + 4.166666666666666e-2
    p = p * r + 1.666666666666667e-1
    p = p * r + 0.5
    p = p * r * r + r
    s = tl.exp2(n)
    return s * p + (s - 1.0)


@triton.jit
def pair_kernel(
    a, b, row, column, row_weight, column_weight, table, factor, totals, panel,
    rows, columns, width, stride_a, stride_b, stride_panel,
    LEVELS: tl.constexpr, CHAIN: tl.constexpr, WEIGHTED: tl.constexpr, HOLLOW: tl.constexpr, SLOPES:
        tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of the panel; see the module.

    Args:
        a: (rows, width) operands, contiguous rows; b: (columns, width).
        row: (rows,) float32 ``origin / 2 - squared norm``; column: (columns,).
        row_weight: (rows,) float32, read if WEIGHTED; column_weight: (columns,).
        table: (3, LEVELS) float32 rate, value, slope.
        factor: (1,) float32 for the slopes.
        totals: (programs,) float32, one sum of values each.
        panel: (rows, columns) slopes, float32 or bfloat16.
    """
    tile_i, tile_j = tl.program_id(0), tl.program_id(1)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    keep_i, keep_j = i < rows, j < columns
    start_a = a + i.to(tl.int64)[:, None] * stride_a
    start_b = b + j.to(tl.int64)[:, None] * stride_b
    dots = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        left = tl.load(start_a + d[None, :], mask=keep_i[:, None] & (d[None, :] < width), other=0.0)
        right = tl.load(start_b + d[None, :], mask=keep_j[:, None] & (d[None, :] < width), other=0.0)
        if UPCAST:
            # The interpreter multiplies bf16 as raw 16-bit integers.
            left, right = left.to(tl.float32), right.to(tl.float32)
        dots = tl.dot(left, tl.trans(right), dots, input_precision=PRECISION)
    shift_i = tl.load(row + i, mask=keep_i, other=0.0)
    shift_j = tl.load(column + j, mask=keep_j, other=0.0)
    exponent = 2.0 * dots + (shift_i[:, None] + shift_j[None, :])
    step = expm1(exponent * tl.load(table))
    values = step * tl.load(table + LEVELS)
    gains = step * tl.load(table + 2 * LEVELS)
    for level in tl.static_range(1, LEVELS):
        if CHAIN:
            step = step * (step + 2.0)
        else:
            step = expm1(exponent * tl.load(table + level) + tl.load(table + 3 * LEVELS + level))
        values += step * tl.load(table + LEVELS + level)
        if SLOPES:
            gains += step * tl.load(table + 2 * LEVELS + level)
    keep = keep_i[:, None] & keep_j[None, :]
    if HOLLOW:
        keep = keep & (i[:, None] != j[None, :])
    if WEIGHTED:
        weight_i = tl.load(row_weight + i, mask=keep_i, other=0.0)
        weight_j = tl.load(column_weight + j, mask=keep_j, other=0.0)
        values *= weight_i[:, None] * weight_j[None, :]
        gains *= weight_i[:, None] * weight_j[None, :]
    values = tl.where(keep, values, 0.0)
    tl.store(totals + tile_i * tl.num_programs(1) + tile_j, tl.sum(tl.sum(values, axis=1), axis=0))
    if SLOPES:
        gains = tl.where(keep, gains * tl.load(factor), 0.0)
        place = panel + i.to(tl.int64)[:, None] * stride_panel + j[None, :]
        tl.store(place, gains.to(panel.dtype.element_ty), mask=keep_i[:, None] & keep_j[None, :])
