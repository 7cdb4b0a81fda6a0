"""Linear probes of every (layer, pooling) cell, trained together as one batched module."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prefgen.errors import CheckpointError, ConfigError
from prefgen.models.pooling import POOLINGS, Pooling

ChoiceRule = Literal["rule", "paper", "by_hand"]
NUM_SEM_LAYERS = 4


class ProbeGrid(nn.Module):
    """One linear classifier per cell: (N, C, D) features -> (N, C, classes) logits.

    The loss is a sum over cells and AdamW works elementwise, so each cell trains exactly as it would alone.
    Features are standardised per cell by statistics set once from the training features.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, *, num_cells: int, dim: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = torch.randn(num_cells, num_classes, dim, generator=generator) / math.sqrt(dim)
        self.weight = nn.Parameter(weight * 0.1)
        self.bias = nn.Parameter(torch.zeros(num_cells, num_classes))
        self.register_buffer("mean", torch.zeros(num_cells, dim))
        self.register_buffer("inverse_std", torch.ones(num_cells, dim))

    @torch.no_grad()
    def set_statistics(self, features: Tensor) -> None:
        """Take mean and standard deviation from training features (N, C, D)."""
        for cell in range(features.shape[1]):
            values = features[:, cell].float()
            self.mean[cell] = values.mean(0)
            self.inverse_std[cell] = 1 / values.std(0, correction=0).clamp(min=1e-5)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, C, classes) in float32 whatever autocast says: a probe must not depend on rounding."""
        with torch.autocast(features.device.type, enabled=False):
            standard = (features.float() - self.mean) * self.inverse_std
            return torch.einsum("ncd,ckd->nck", standard, self.weight) + self.bias

    def loss(self, features: Tensor, *, labels: Tensor) -> Tensor:
        """Cross-entropy per cell (C,); labels (N,), or (N, C) for each cell its own. Train on the SUM."""
        logits = self(features)
        repeated = labels if labels.ndim == 2 else labels[:, None].expand(-1, logits.shape[1])
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), repeated.reshape(-1), reduction="none")
        return losses.view(repeated.shape).mean(0)


@dataclass(frozen=True, kw_only=True)
class CellAccuracy:
    """Accuracy of one cell with a 95 % interval over users."""

    layer: int
    pooling: Pooling
    accuracy: float
    low: float
    high: float
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class ControlAccuracy:
    """Shuffled labels: mean over cells with a 95 % interval, and the chance it should cover."""

    mean: float
    low: float
    high: float
    chance: float


def control_accuracy(cells: Sequence[CellAccuracy], *, num_classes: int) -> ControlAccuracy:
    """Mean over cells, each trained on a shuffling of its own.

    The interval comes from the spread over cells, not from users: a user's samples resemble each other, so
    one shuffling gets a user all right or all wrong, and with few users no single one says much.
    """
    values = np.array([cell.accuracy for cell in cells])
    margin = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return ControlAccuracy(mean=mean, low=mean - margin, high=mean + margin, chance=1 / num_classes)


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """Where core and sem are read. Layers are numbered 1 to L."""

    sem_layers: tuple[int, ...]
    sem_pooling: Pooling
    core_layer: int
    core_pooling: Pooling


@dataclass(frozen=True, kw_only=True)
class LayersByHand:
    """What of a :class:`LayerChoice` is given; what is empty or None is left to the rule."""

    sem_layers: tuple[int, ...] = ()
    sem_pooling: Pooling | None = None
    core_layer: int | None = None
    core_pooling: Pooling | None = None

    def check(self, *, num_layers: int) -> None:
        """Refuse layers that are not there.

        Raises:
            ConfigError: a layer the MLLM does not have, or too few for the rule to take four.
        """
        core = () if self.core_layer is None else (self.core_layer,)
        for key, layers in (("probe.sem_layers", self.sem_layers), ("probe.core_layer", core)):
            absent = [layer for layer in layers if not 1 <= layer <= num_layers]
            if absent:
                raise ConfigError(
                    f"{key}: there is no layer {absent[0]}; the MLLM has {num_layers}, numbered 1 (lowest) "
                    f"to {num_layers} (top)"
                )
        if not self.sem_layers and num_layers < NUM_SEM_LAYERS:
            raise ConfigError(
                f"sem takes {NUM_SEM_LAYERS} layers, but the MLLM has {num_layers}; pass "
                "probe.choice=by_hand and probe.sem_layers"
            )

    def words(self) -> str:
        """What is given, as it stands in a message."""
        parts = {
            "sem layers": ", ".join(map(str, self.sem_layers)),
            "sem pooling": self.sem_pooling,
            "core layer": self.core_layer,
            "core pooling": self.core_pooling,
        }
        return "; ".join(f"{name} {value}" for name, value in parts.items() if value)


def cell_accuracies(
    correct: np.ndarray, *, groups: np.ndarray, num_layers: int, seed: int, num_resamples: int = 1000
) -> list[CellAccuracy]:
    """Accuracy and bootstrap interval of each cell.

    Args:
        correct: (N, layers * poolings) 0 or 1, layer by layer.
        groups: (N,) which user a sample belongs to; users are resampled, for samples of one user agree.
        num_layers: L.
        seed: of the resampling.
        num_resamples: bootstrap draws.
    """
    users, member = np.unique(groups, return_inverse=True)
    hits = np.zeros((len(users), correct.shape[1]))
    np.add.at(hits, member, correct)
    sizes = np.bincount(member).astype(np.float64)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(users), np.full(len(users), 1 / len(users)), size=num_resamples)
    resampled = (drawn @ hits) / (drawn @ sizes)[:, None]
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    accuracy = hits.sum(0) / sizes.sum()
    poolings = POOLINGS[: correct.shape[1] // num_layers]
    cells = [(layer, pooling) for layer in range(1, num_layers + 1) for pooling in poolings]
    return [
        CellAccuracy(
            layer=layer,
            pooling=pooling,
            accuracy=float(accuracy[i]),
            low=float(low[i]),
            high=float(high[i]),
            num_samples=int(correct.shape[0]),
        )
        for i, (layer, pooling) in enumerate(cells)
    ]


def choose_layers(
    *,
    inter: Sequence[CellAccuracy],
    intra: Sequence[CellAccuracy],
    num_layers: int,
    rule: ChoiceRule,
    by_hand: LayersByHand | None = None,
) -> LayerChoice:
    """Core from the inter-user grid, sem from the intra-user grid.

    Core is the best inter-user cell of the upper half of the layers. Sem is, by "paper", the last token of
    the top four layers; by "rule", the pooling whose four best layers are best on average, with those four
    layers. By "by_hand" what is given stands, and the rule chooses the rest among the cells that agree with
    it. Of equals the higher layer, then the earlier pooling, wins.

    Raises:
        ConfigError: the model has fewer than four layers, or not those given by hand.
    """
    fixed = by_hand if rule == "by_hand" and by_hand is not None else LayersByHand()
    fixed.check(num_layers=num_layers)
    if rule == "paper":
        top = tuple(range(num_layers - NUM_SEM_LAYERS + 1, num_layers + 1))
        fixed = LayersByHand(sem_layers=top, sem_pooling="last")
    half = range((num_layers + 1) // 2, num_layers + 1)
    core_layers = half if fixed.core_layer is None else (fixed.core_layer,)
    cells = [
        cell for cell in inter if cell.layer in core_layers and fixed.core_pooling in (None, cell.pooling)
    ]
    core = max(cells, key=lambda cell: (cell.accuracy, cell.layer, -POOLINGS.index(cell.pooling)))
    poolings = POOLINGS if fixed.sem_pooling is None else (fixed.sem_pooling,)
    best = {name: _best_layers(intra, pooling=name, given=fixed.sem_layers) for name in poolings}
    sem_pooling = max(poolings, key=lambda name: (best[name][0], -POOLINGS.index(name)))
    return LayerChoice(
        sem_layers=best[sem_pooling][1],
        sem_pooling=sem_pooling,
        core_layer=core.layer,
        core_pooling=core.pooling,
    )


def choice_to_json(choice: LayerChoice) -> dict[str, Any]:
    """As it stands in probe.json; ``prefgen.lineage.hash_json`` of it is the "probe" part of a lineage."""
    return {
        "core": {"layer": choice.core_layer, "pooling": choice.core_pooling},
        "sem": {"layers": list(choice.sem_layers), "pooling": choice.sem_pooling},
    }


def read_choice(path: Path, *, lineage: Mapping[str, str] | None = None) -> LayerChoice:
    """The choice in a probe.json.

    Args:
        path: the file.
        lineage: part -> hash of the MLLM and LoRA it will be used with; parts that either side does not know
            are not compared. Layers chosen on one model say nothing about another.

    Raises:
        CheckpointError: no such file, no choice of known poolings in it, or it was made with other models.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, made_with = record["choice"], dict(record.get("lineage", {}))
        choice = LayerChoice(
            sem_layers=tuple(int(layer) for layer in found["sem"]["layers"]),
            sem_pooling=found["sem"]["pooling"],
            core_layer=int(found["core"]["layer"]),
            core_pooling=found["core"]["pooling"],
        )
    except OSError:
        raise CheckpointError(f"no {path}; run 'prefgen fit --stage probe' first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} holds no choice of layers ({type(error).__name__}: {error})") from None
    if not {choice.core_pooling, choice.sem_pooling} <= set(POOLINGS) or not choice.sem_layers:
        raise CheckpointError(f"{path}: poolings must be among {', '.join(POOLINGS)}")
    for part, value in (lineage or {}).items():
        if made_with.get(part, value) != value:
            raise CheckpointError(
                f"{path} was made with another {part} ({str(made_with[part])[:12]}) than this one "
                f"({value[:12]}); delete its folder and run 'prefgen fit --stage probe' again"
            )
    return choice


def rule_words(rule: ChoiceRule, *, by_hand: LayersByHand | None = None) -> str:
    """The written rule for probe.json."""
    core = "core: the best inter-user cell of the middle-to-upper layers"
    if rule == "paper":
        return f"{core}; sem: last token of the top four layers (the paper's choice)"
    words = (
        f"{core}; sem: the pooling whose four best intra-user layers are best on average, with those layers"
    )
    if rule == "by_hand" and by_hand is not None:
        return f"by hand: {by_hand.words()}; what that leaves open by the rule: {words}"
    return words


def _best_layers(
    cells: Sequence[CellAccuracy], *, pooling: Pooling, given: Sequence[int] = ()
) -> tuple[float, tuple[int, ...]]:
    """Mean accuracy and numbers of the four best layers of a pooling, or of all those given."""
    own = [cell for cell in cells if cell.pooling == pooling and (not given or cell.layer in given)]
    if not given:
        own = sorted(own, key=lambda cell: (cell.accuracy, cell.layer))[-NUM_SEM_LAYERS:]
    return sum(cell.accuracy for cell in own) / len(own), tuple(sorted(cell.layer for cell in own))
