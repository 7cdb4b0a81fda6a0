"""MMD^2 as a module: options fixed once, bandwidth calibrated once and kept in the state dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from prefgen.mmd.across import gather_rows
from prefgen.mmd.api import mmd2
from prefgen.mmd.bandwidth import DEFAULT_MULTIPLIERS, Bandwidth, resolve_mixture
from prefgen.mmd.errors import MMDError
from prefgen.mmd.form import Estimator
from prefgen.mmd.kernels import KernelName


class MMDLoss(nn.Module):
    """Training loss with a frozen bandwidth.

    A bandwidth that follows each batch changes the loss while it is minimised and makes two steps
    incomparable: call :meth:`calibrate` once on typical data. Until then "mean" and "median" are taken from
    each batch.

    Args:
        kernel: see :func:`prefgen.mmd.mmd2`, as for all other arguments.
        bandwidth: a number, several, "mean" or "median".
        multipliers: factors on each sigma.
        coefs: "mean", "sum" or numbers.
        alpha: exponent of the rq kernel.
        estimator: which estimator.
        block_size: rows per block of estimator "block".
        group: ranks whose batches form one (torch.distributed.group.WORLD for all).
        grad_reduce: how the trainer joins gradients: "mean" for DDP and FSDP.
    """

    sigma: Tensor

    def __init__(
        self,
        *,
        kernel: KernelName = "gaussian",
        bandwidth: Bandwidth = "mean",
        multipliers: Sequence[float] | None = None,
        coefs: str | Sequence[float] = "mean",
        alpha: float = 1.0,
        estimator: Estimator = "biased",
        block_size: int | tuple[int, int] | None = None,
        group: ProcessGroup | None = None,
        grad_reduce: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.multipliers = multipliers
        self.coefs = coefs
        self.alpha = alpha
        self.estimator = estimator
        self.block_size = block_size
        self.group = group
        self.grad_reduce = grad_reduce
        # 0 means "not calibrated": a NaN would poison a state dict comparison, None would not be saved.
        self.register_buffer("sigma", torch.zeros((), dtype=torch.float64))
        # The same on the host, so that a step on a GPU need not ask the device.
        self._frozen = False
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    @property
    def calibrated(self) -> bool:
        """Whether the bandwidth is frozen."""
        return self._frozen

    @torch.no_grad()
    def calibrate(self, x: Tensor, y: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """Freeze "mean" or "median" of these rows as the bandwidth.

        Args:
            x: (N, D).
            y: (M, D).
            group: take the mean over the rows of all ranks of this group.

        Returns:
            0-dim float64 sigma, before the multipliers.

        Raises:
            MMDError: the bandwidth was given as numbers.
        """
        if not isinstance(self.bandwidth, str):
            raise MMDError("calibrate: the bandwidth was given as numbers; there is nothing to calibrate")
        if group is not None:
            x, y = gather_rows(x, group=group).rows, gather_rows(y, group=group).rows
        mixture = resolve_mixture(x, y, bandwidth=self.bandwidth, multipliers=(1.0,), coefs="mean")
        self.sigma.copy_(mixture.sigma[0])
        self._frozen = True
        return self.sigma

    def forward(self, x: Tensor, y: Tensor, wx: Tensor | None = None, wy: Tensor | None = None) -> Tensor:
        """MMD^2 of x (N, D) and y (M, D): 0-dim, float32 (float64 for float64)."""
        bandwidth, multipliers = self.bandwidth, self.multipliers
        if self._frozen:
            bandwidth = self.sigma
            multipliers = DEFAULT_MULTIPLIERS if multipliers is None else multipliers
        return mmd2(
            x, y, kernel=self.kernel, bandwidth=bandwidth, multipliers=multipliers, coefs=self.coefs,
            alpha=self.alpha, estimator=self.estimator, wx=wx, wy=wy, block_size=self.block_size,
            group=self.group, grad_reduce=self.grad_reduce,
        )  # fmt: skip


def _after_load(module: nn.Module, incompatible: object) -> None:
    assert isinstance(module, MMDLoss)
    module._frozen = bool(module.sigma > 0)
