"""Attributes read linearly from ``sem_embeds``: words for a profile that holds none.

One ridge regression for all attributes, its strength chosen by leave-one-out error; then a logistic curve
per attribute on scores of users that the regression has not seen, so that a probability says how often such
a reading is right. An attribute that cannot be read comes out at its share among those users.
Nothing here is the paper's; the MLLM's own words are another thing (:mod:`prefgen.models.representation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prefgen.errors import CheckpointError
from prefgen.models.artefact_file import ArtefactKind

KIND = ArtefactKind(name="attribute readout", key="attribute_readout", version=1, stage="align")
"""``attribute_readout.safetensors``."""

MIN_USERS = 8
"""Fewer training users than this say nothing about how far a reading can be trusted."""

MIN_HELD_OUT = 64
"""Fewer held-out users give worse curves than the left-out scores of the training users."""

_RIDGES = tuple(10.0**power for power in range(-4, 3))
_NEWTON_STEPS = 60
_SMALLEST_SCALE = 1e-3
_NAMES = ("sem_mean", "sem_scale", "weight", "bias", "share")


class ReadWord(NamedTuple):
    """An attribute and the probability with which it is read, in [0, 1]."""

    attribute: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class AttributeReadout:
    """A linear map from ``sem_embeds`` to the probability of each attribute. Tensors are float32, on the CPU.

    Attributes:
        attributes: A words.
        sem_mean: (Dsem,) of the training users.
        sem_scale: (Dsem,) what a coordinate is divided by.
        weight: (A,Dsem).
        bias: (A,).
        share: (A,) share of the training users who like the attribute.
        num_users: training users it was fitted on.
        lineage: part -> hash of the models whose embeddings it reads.
    """

    attributes: tuple[str, ...]
    sem_mean: Tensor
    sem_scale: Tensor
    weight: Tensor
    bias: Tensor
    share: Tensor
    num_users: int
    lineage: Mapping[str, str]

    def __post_init__(self) -> None:
        """Refuse tensors that do not fit together.

        Raises:
            CheckpointError: a shape differs, or a number is not finite.
        """
        width, count = self.sem_mean.shape[-1], len(self.attributes)
        shapes = {
            "sem_mean": (width,),
            "sem_scale": (width,),
            "weight": (count, width),
            "bias": (count,),
            "share": (count,),
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"attribute readout: {name} must be finite of shape {shape}, got {tuple(tensor.shape)}"
                )

    def probabilities(self, sem: Tensor) -> Tensor:
        """(N,Dsem) -> (N,A) in [0,1].

        Raises:
            CheckpointError: ``sem`` is of another width.
        """
        if sem.shape[-1] != len(self.sem_mean):
            raise CheckpointError(
                f"the attribute readout takes sem of width {len(self.sem_mean)}, got {sem.shape[-1]}"
            )
        rows = (sem.float().cpu() - self.sem_mean) / self.sem_scale
        return torch.sigmoid(rows @ self.weight.T + self.bias)

    def read(
        self, sem: Tensor, *, at_least: float = 0.5, fewest: int = 3, most: int = 12
    ) -> tuple[ReadWord, ...]:
        """Attributes of one user, likeliest first.

        Args:
            sem: (Dsem,) the user's ``sem_embeds``, or the negative twin for what the user dislikes.
            at_least: the probability from which an attribute is named.
            fewest: so many are named whatever their probability, which is there to be read.
            most: more are never named.
        """
        found = self.probabilities(sem[None])[0]
        order = found.argsort(descending=True, stable=True).tolist()
        likely = int((found >= at_least).sum())
        return tuple(
            ReadWord(self.attributes[i], float(found[i])) for i in order[: max(fewest, min(likely, most))]
        )


def fit_readout(
    sem: Tensor,
    *,
    labels: Tensor,
    attributes: Sequence[str],
    lineage: Mapping[str, str],
    held_out: tuple[Tensor, Tensor] | None = None,
) -> AttributeReadout:
    """Fit on training users; deterministic, closed form but for the two numbers of each logistic curve.

    Args:
        sem: (N,Dsem) one row a user, N >= ``MIN_USERS``.
        labels: (N,A) booleans, user likes attribute.
        attributes: the columns of ``labels``.
        lineage: part -> hash of the models that made ``sem``.
        held_out: sem and labels of users whom the MLLM's LoRA has not seen either; taken for the curves where
            they are at least ``MIN_HELD_OUT``. It was taught the training users' attributes, so on those
            every reading looks surer than it is.

    Raises:
        ValueError: too few users, or numbers that do not fit together.
    """
    if len(sem) < MIN_USERS or labels.shape != (len(sem), len(attributes)):
        raise ValueError(f"cannot fit {tuple(labels.shape)} labels of {len(attributes)} on {len(sem)} users")
    rows, targets = sem.double().cpu(), labels.double().cpu()
    mean, scale = rows.mean(dim=0), rows.std(dim=0, correction=0)
    # A coordinate that hardly moves would hand the readout its rounding noise, blown up.
    scale = scale.clamp_min(_SMALLEST_SCALE * float(scale.max())).clamp_min(1e-12) * rows.shape[1] ** 0.5
    weight, scores = _ridge((rows - mean) / scale, targets=targets)
    share, truth = targets.mean(dim=0), targets
    if held_out is not None and len(held_out[0]) >= MIN_HELD_OUT:
        unseen = (held_out[0].double().cpu() - mean) / scale
        scores, truth = unseen @ weight.T + share, held_out[1].double().cpu()
    slope, offset = _logistic(scores, targets=truth)
    return AttributeReadout(
        attributes=tuple(attributes),
        sem_mean=mean.float(),
        sem_scale=scale.float(),
        weight=(slope[:, None] * weight).float(),
        bias=(slope * share + offset).float(),
        share=share.float(),
        num_users=len(rows),
        lineage=dict(lineage),
    )


def _ridge(rows: Tensor, *, targets: Tensor) -> tuple[Tensor, Tensor]:
    """((A,D) weights on centred rows (N,D), (N,A) scores of each row by a fit without it).

    One decomposition serves every strength: a left-out residual is the residual over 1 - h, with h the
    row's own weight in its fitted value (1/N of it from the intercept). Exact for ridge.
    """
    count = len(rows)
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    centred = targets - targets.mean(dim=0)
    inside = left.T @ centred
    # An attribute liked by everybody has no variance to explain; it must not divide by zero either.
    variance = centred.pow(2).mean(dim=0).clamp_min(1e-12)
    best: tuple[float, Tensor, Tensor] | None = None
    for ridge in _RIDGES:
        kept = singular.pow(2) / (singular.pow(2) + ridge * count)
        own = (1 / count + (left.pow(2) * kept).sum(dim=1)).clamp_max(1 - 1e-9)
        residual = (centred - left @ (kept[:, None] * inside)) / (1 - own)[:, None]
        error = float((residual.pow(2).mean(dim=0) / variance).mean())
        if best is None or error < best[0]:
            shrunk = (singular / (singular.pow(2) + ridge * count))[:, None] * inside
            best = error, (right.T @ shrunk).T, targets - residual
    assert best is not None
    return best[1], best[2]


def _logistic(scores: Tensor, *, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(A,) slope and (A,) offset of sigmoid(slope * score + offset), per column of (N,A).

    Newton's method on the cross-entropy against targets drawn in from 0 and 1 by one user each (Platt 1999),
    so that attributes that split without error keep a finite slope. A slope below zero means that left-out
    scores say nothing: it becomes zero, and the offset that of the plain share.
    """
    count, positive = len(scores), targets.sum(dim=0)
    high, low = (positive + 1) / (positive + 2), 1 / (count - positive + 2)
    wanted = targets * high + (1 - targets) * low
    centre, width = scores.mean(dim=0), scores.std(dim=0, correction=0).clamp_min(1e-9)
    rows = torch.stack([(scores - centre) / width, torch.ones_like(scores)], dim=-1)
    plain = torch.logit(wanted.mean(dim=0))
    found = torch.stack([torch.zeros_like(plain), plain], dim=-1)
    for _ in range(_NEWTON_STEPS):
        probability = torch.sigmoid((rows * found).sum(dim=-1))
        gradient = (rows * (probability - wanted)[..., None]).sum(dim=0)
        spread = probability * (1 - probability)
        curvature = torch.einsum("nai,naj,na->aij", rows, rows, spread) + 1e-6 * torch.eye(2).double()
        # A whole Newton step overshoots where the curve is flat.
        step = torch.linalg.solve(curvature, gradient).clamp(-1, 1)
        found = found - step
        if float(step.abs().max()) < 1e-9:
            break
    told = found[:, 0] > 0
    slope = torch.where(told, found[:, 0] / width, 0.0)
    return slope, torch.where(told, found[:, 1], plain) - slope * centre


def save_readout(readout: AttributeReadout, *, path: Path) -> None:
    """Write ``attribute_readout.safetensors``."""
    header = {
        "attributes": list(readout.attributes),
        "num_users": readout.num_users,
        "lineage": dict(readout.lineage),
    }
    KIND.write(path, tensors={name: getattr(readout, name) for name in _NAMES}, header=header)


def load_readout(path: Path) -> AttributeReadout:
    """Read ``attribute_readout.safetensors``.

    Raises:
        CheckpointError: absent, torn, of another kind or version, or with parts that do not fit together.
    """
    header, tensors = KIND.read(path)
    with KIND.fitting(path):
        return AttributeReadout(
            **tensors,
            attributes=tuple(str(word) for word in header["attributes"]),
            num_users=int(header["num_users"]),
            lineage={str(part): str(value) for part, value in header["lineage"].items()},
        )
