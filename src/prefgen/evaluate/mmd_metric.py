"""MMD^2 between two growing sets of features, as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from prefgen.errors import DataError
from prefgen.mmd import mmd2
from prefgen.mmd.bandwidth import Bandwidth
from prefgen.mmd.form import Estimator
from prefgen.mmd.kernels import KernelName


class MMDMetric(Metric):
    """Collects rows of both sides and compares them at the end, exactly, over all ranks.

    The sides may differ in size (torchmetrics' KID divides by one size for both and is wrong then). Rows
    are kept, so memory grows with the data; for sets larger than memory see mmd_stream.

    Args:
        kernel: as in prefgen.mmd.mmd2, like the next five.
        bandwidth: "mean" and "median" are taken from all collected rows.
        multipliers: see mmd2.
        coefs: see mmd2.
        alpha: see mmd2.
        estimator: "unbiased" by default: its mean does not depend on the sample size.
        scale: multiplies the result.
        options: of torchmetrics.Metric.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    rows_x: list[Tensor]
    rows_y: list[Tensor]

    def __init__(
        self,
        *,
        kernel: KernelName = "gaussian",
        bandwidth: Bandwidth = "median",
        multipliers: Sequence[float] | None = None,
        coefs: str | Sequence[float] = "mean",
        alpha: float = 1.0,
        estimator: Estimator = "unbiased",
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.multipliers = multipliers
        self.coefs = coefs
        self.alpha = alpha
        self.estimator = estimator
        self.scale = scale
        self.add_state("rows_x", default=[], dist_reduce_fx="cat")
        self.add_state("rows_y", default=[], dist_reduce_fx="cat")

    def update(self, x: Tensor | None = None, y: Tensor | None = None) -> None:
        """Add rows to either side.

        Args:
            x: (n, D) or None.
            y: (m, D) or None.

        Raises:
            DataError: rows that are not a matrix.
        """
        for rows, held in ((x, self.rows_x), (y, self.rows_y)):
            if rows is None:
                continue
            if rows.ndim != 2:
                raise DataError(f"MMDMetric: rows must be (n, D), got shape {tuple(rows.shape)}")
            held.append(rows.detach().float() if rows.dtype != torch.float64 else rows.detach())

    def compute(self) -> Tensor:
        """0-dim MMD^2 times ``scale``.

        Raises:
            DataError: a side has no rows yet.
        """
        for name, held in (("x", self.rows_x), ("y", self.rows_y)):
            if isinstance(held, list) and not held:
                raise DataError(f"MMDMetric: no rows of {name} yet; call update({name}=...) first")
        value = mmd2(
            dim_zero_cat(self.rows_x),
            dim_zero_cat(self.rows_y),
            kernel=self.kernel,
            bandwidth=self.bandwidth,
            multipliers=self.multipliers,
            coefs=self.coefs,
            alpha=self.alpha,
            estimator=self.estimator,
        )
        return value * self.scale
