"""Kernel values without gradients, tile by tile: for potentials, permutation tests and streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefgen.mmd.dispatch import CPU_TILE, GPU_TILE
from prefgen.mmd.epilogue import pair_values
from prefgen.mmd.gemm import dots
from prefgen.mmd.kernels import Levels
from prefgen.mmd.native import MAX_LEVELS, call_tile, native_status
from prefgen.mmd.tiled import blocks


@dataclass(frozen=True, kw_only=True)
class PairValues:
    """Centred kernel values ``k(q) - k(q0)`` of pairs of centred rows.

    Attributes:
        levels: the mixture around its origin.
        kernel: one of KERNELS.
        alpha: exponent of rq.
        chain: levels are squares of one another.
    """

    levels: Levels
    kernel: str
    alpha: float
    chain: bool

    def tile_rows(self, device: torch.device) -> int:
        """Rows of a tile on this device."""
        return GPU_TILE // 2 if device.type == "cuda" else CPU_TILE

    def tile(self, a: Tensor, b: Tensor, row: Tensor, column: Tensor, *, hollow: bool) -> Tensor:
        """(I, D), (J, D), squared norms (I,), (J,) float64 -> (I, J); 0 on the diagonal if ``hollow``."""
        products = dots(a, b)
        library = native_status().library if self._native(a) else None
        if library is not None:
            call_tile(
                library, products, row, column, None, None, self.levels.table(),
                chain=self.chain, mode=2, hollow=hollow,
            )  # fmt: skip
            return products
        values, _ = pair_values(
            products, row, column, self.levels.table(),
            kernel=self.kernel, alpha=self.alpha, chain=self.chain, slopes=False,
        )  # fmt: skip
        if hollow:
            values.diagonal().zero_()
        return values

    def total(self, a: Tensor, b: Tensor, row: Tensor, column: Tensor, *, same: bool) -> Tensor:
        """0-dim float64 sum over all pairs; with ``same`` (a is b) over ordered pairs i != j."""
        size = self.tile_rows(a.device)
        total = torch.zeros((), dtype=torch.float64, device=a.device)
        library = native_status().library if self._native(a) else None
        parts = list(blocks(0, b.shape[0], size))
        for first, i in enumerate(blocks(0, a.shape[0], size)):
            for j in parts[first:] if same else parts:
                hollow = same and i == j
                times = 2.0 if same and not hollow else 1.0
                if library is not None:
                    part = call_tile(
                        library, dots(a[i], b[j]), row[i], column[j], None, None, self.levels.table(),
                        chain=self.chain, mode=0, hollow=hollow,
                    )  # fmt: skip
                    total += part * times
                else:
                    values = self.tile(a[i], b[j], row[i], column[j], hollow=hollow)
                    total += values.sum(1).sum(dtype=torch.float64) * times
        return total

    def _native(self, a: Tensor) -> bool:
        return (
            self.kernel == "gaussian"
            and a.device.type == "cpu"
            and a.dtype == torch.float32
            and type(a) is Tensor
            and self.levels.rate.shape[0] <= MAX_LEVELS
        )
