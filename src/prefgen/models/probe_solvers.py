"""Ridge and logistic probes solved to the end, cell by cell, on the pooled states AdamW's probes train on.

Both standardise features by the training mean and deviation and leave the intercept unpenalised: they are
scikit-learn's ``Ridge`` and ``LogisticRegression`` behind a ``StandardScaler``; tests hold them to it.
Which classifier probes is our choice: the paper does not say.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prefgen.models.probes import ProbeGrid

logger = logging.getLogger(__name__)

Classifier = Literal["adamw", "ridge", "logistic"]
CLASSIFIERS: tuple[Classifier, ...] = get_args(Classifier)
"""Trained by steps of AdamW; least squares on the classes' indicators; cross-entropy to convergence."""

CHUNK = 1024
"""Samples of a cell that stand in float64 at a time."""

MOST_BYTES = 1 << 29
"""Second moments of so many bytes are kept at a time; one cell's are kept whatever its width."""

_LBFGS_STEPS = 1000
_GRADIENT = 1e-7
"""Largest entry of the gradient of the mean loss at which a logistic probe counts as converged."""


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """Logits ``x @ weight.T + bias`` of C cells: weight (C, K, D), bias (C, K), float64."""

    weight: Tensor
    bias: Tensor


class RidgeSums:
    """What ridge regression has to know of the samples: their sums, never the samples themselves.

    C * (D + 1) * (D + K + 1) float64 numbers however many samples are added.

    Args:
        num_cells: C.
        dim: D.
        num_classes: K.
        device: where the sums are kept.
    """

    def __init__(
        self, *, num_cells: int, dim: int, num_classes: int, device: torch.device | str = "cpu"
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_cells, *shape, dtype=torch.float64, device=device)

        self.count = 0
        self._features, self._targets = zeros(dim), zeros(num_classes)
        self._moments, self._shared = zeros(dim, dim), zeros(dim, num_classes)

    def add(self, features: Tensor, *, labels: Tensor) -> None:
        """Add features (N, C, D) with labels (N, C), numbers of classes."""
        rows = features.transpose(0, 1).double()
        targets = nn.functional.one_hot(labels.T, self._targets.shape[1]).to(rows)
        self.count += len(features)
        self._features += rows.sum(1)
        self._targets += targets.sum(1)
        self._moments += rows.transpose(1, 2) @ rows
        self._shared += rows.transpose(1, 2) @ targets

    def solve(self, *, l2: float) -> LinearMap:
        """The minimum of mean ``|y - W x - b|^2 + l2 |W|^2`` for every cell; ``l2`` above 0."""
        mean, share = self._features / self.count, self._targets / self.count
        moments = self._moments / self.count - mean[:, :, None] * mean[:, None]
        shared = self._shared / self.count - mean[:, :, None] * share[:, None]
        moments.diagonal(dim1=1, dim2=2).add_(l2)
        weight = torch.cholesky_solve(shared, torch.linalg.cholesky(moments)).transpose(1, 2)
        return LinearMap(weight=weight, bias=share - (weight @ mean[:, :, None])[..., 0])


def fit_logistic(features: Tensor, *, labels: Tensor, num_classes: int, l2: float) -> LinearMap:
    """The minimum of the mean cross-entropy + ``l2 / 2 |W|^2`` of one cell, by L-BFGS.

    Args:
        features: (N, D).
        labels: (N,) numbers of classes.
        num_classes: K.
        l2: strength, above 0: without it separable classes have no minimum.

    Returns:
        A map of one cell. Where it has not converged, a warning says how far it came.
    """
    rows = features.double()
    weight = rows.new_zeros(num_classes, rows.shape[1]).requires_grad_()
    bias = rows.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_LBFGS_STEPS,
        tolerance_grad=_GRADIENT,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(rows @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
        loss()
    assert weight.grad is not None
    assert bias.grad is not None
    left = max(float(weight.grad.abs().max()), float(bias.grad.abs().max()))
    if left > 10 * _GRADIENT:
        logger.warning("a logistic probe stopped at a gradient of %.1e (wanted %.0e)", left, _GRADIENT)
    return LinearMap(weight=weight.detach()[None], bias=bias.detach()[None])


@torch.no_grad()
def solve_grid(
    kind: Literal["ridge", "logistic"],
    features: Tensor,
    *,
    labels: Tensor,
    num_classes: int,
    l2: float,
    device: torch.device | str = "cpu",
) -> ProbeGrid:
    """Every cell's probe. Beside the features only a chunk, or one cell of them, stands in float64.

    Args:
        kind: which loss.
        features: (N, C, D) pooled training states, on the CPU.
        labels: (N,), or (N, C) for each cell its own.
        num_classes: K.
        l2: strength beside the mean loss on standardised features, above 0. In scikit-learn's terms ridge has
            ``alpha = l2 * N``, logistic ``C = 1 / (l2 * N)`` (for two classes ``2 / (l2 * N)``: there it
            penalises the difference of the two).
        device: where to solve.

    Returns:
        A grid on ``device``; its argmax is the guess.
    """
    _, cells, dim = features.shape
    grid = ProbeGrid(
        num_cells=cells, dim=dim, num_classes=num_classes, generator=torch.Generator().manual_seed(0)
    )
    grid.set_statistics(features)
    grid = grid.to(device).requires_grad_(False)
    own = labels if labels.ndim == 2 else labels[:, None].expand(-1, cells)
    step = max(1, MOST_BYTES // (8 * dim * dim)) if kind == "ridge" else 1
    for start in range(0, cells, step):
        some = slice(start, min(start + step, cells))
        found = _solve(kind, features, own, grid=grid, cells=some, l2=l2)
        grid.weight[some], grid.bias[some] = found.weight.float(), found.bias.float()
    return grid


def _solve(
    kind: str, features: Tensor, labels: Tensor, *, grid: ProbeGrid, cells: slice, l2: float
) -> LinearMap:
    mean, inverse_std = grid.mean[cells].double(), grid.inverse_std[cells].double()
    device, num_classes = mean.device, grid.weight.shape[1]

    def standard(samples: slice) -> Tensor:
        return (features[samples, cells].to(device).double() - mean) * inverse_std

    if kind == "logistic":
        rows, own = standard(slice(None))[:, 0], labels[:, cells][:, 0].to(device)
        return fit_logistic(rows, labels=own, num_classes=num_classes, l2=l2)
    sums = RidgeSums(num_cells=len(mean), dim=mean.shape[1], num_classes=num_classes, device=device)
    for start in range(0, len(features), CHUNK):
        samples = slice(start, start + CHUNK)
        sums.add(standard(samples), labels=labels[samples, cells].to(device))
    return sums.solve(l2=l2)
