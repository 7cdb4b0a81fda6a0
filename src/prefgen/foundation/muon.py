"""Muon: momentum whose every matrix is made orthogonal before it is applied (Jordan et al. 2024).

``torch.optim.Muon`` takes plain matrices alone and orthogonalises in bf16, which a CPU without bf16 products
emulates at a small part of its speed; this one takes convolutions as matrices too and works in float32. Its
steps have the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose repetition sends singular values in (0, 1] near 1 (Jordan et al.)."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, with decoupled weight decay.

    Args:
        parameters: of two dimensions or more; all after the first are taken as one.
        lr: learning rate, on AdamW's scale.
        momentum: decay of the mean gradient, in [0, 1).
        weight_decay: as AdamW's.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; ``closure`` is not used."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    ahead = self._ahead(parameter, momentum=group["momentum"])
                    rows, columns = ahead.shape
                    alike.setdefault((rows, columns), []).append((parameter, ahead))
            # Matrices of one shape together: a UNet has 128, most of them small.
            for shape, found in alike.items():
                updates = orthogonal(torch.stack([ahead for _, ahead in found]))
                size = 0.2 * max(shape) ** 0.5
                for (parameter, _), update in zip(found, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * size)

    def _ahead(self, parameter: nn.Parameter, *, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        mean: Tensor = state["mean"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum).flatten(1)


def orthogonal(matrices: Tensor, *, rounds: int = 5) -> Tensor:
    """Matrices with their singular values sent near 1, by Newton-Schulz rounds.

    All rounds are polynomials of the one Gram matrix, so they are taken there, on the shorter side: for a
    convolution, nine times as long as wide, that is less than half of the products.

    Args:
        matrices: shape (.., m, n).
        rounds: 5 bring values above about 0.01 of the largest into [0.7, 1.2].
    """
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    wide = matrices if is_wide else matrices.mT
    wide = wide / wide.square().sum(dim=(-2, -1), keepdim=True).sqrt().add(1e-7)
    linear, cubic, quintic = COEFFICIENTS
    gram = wide @ wide.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = identity
    for _ in range(rounds):
        step = linear * identity + cubic * gram + quintic * (gram @ gram)
        factor = step @ factor
        gram = step @ gram @ step
    wide = factor @ wide
    return wide if is_wide else wide.mT
