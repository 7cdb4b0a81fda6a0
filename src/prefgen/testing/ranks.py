"""One stage trained by several gloo ranks and by one process over the same global batches, compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from prefgen.checkpoint import list_checkpoints
from prefgen.config import load_config
from prefgen.precision import settle_precision
from prefgen.run import fit, load_class
from prefgen.run_noise import quiet_lightning
from prefgen.stages import STAGES
from prefgen.testing.distributed import run_distributed
from prefgen.testing.stages import STAGE_ARTEFACTS, tiny_settings

Strategy = Literal["ddp", "fsdp2"]

RANK_BATCH = {"vqa": 2, "probe": 4, "align": 4, "inject": 2}
"""Samples a step on each rank, small enough for four ranks on the tiny workdir's 24 training users."""


@dataclass(frozen=True, kw_only=True)
class RankComparison:
    """How far several ranks end from one process.

    Attributes:
        loss_difference: largest difference between a step's loss and the ranks' mean.
        weight_difference: largest difference between two trained weights after the last step.
        weight_size: largest trained weight, to read the difference by.
        weight_moved: largest change of a weight from the first to the last step of the one process.
        metric_differences: validation metric -> difference.
        losses: of the one process, step by step.
        same_artefact: whether the artefacts are equal bit for bit.
    """

    loss_difference: float
    weight_difference: float
    weight_size: float
    weight_moved: float
    metric_differences: dict[str, float]
    losses: tuple[float, ...]
    same_artefact: bool


class _Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []
        self.start: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer
        self.start = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        del trainer, pl_module
        self.values.append(float(loss.detach()))


def compare_ranks(
    stage: str, *, workdir: Path, folder: Path, world_size: int, strategy: Strategy = "ddp", steps: int = 20
) -> RankComparison:
    """Train a stage both ways.

    Args:
        stage: which one.
        workdir: of :func:`prefgen.testing.study.save_tiny_workdir` with at least 48 users.
        folder: where the two run folders go.
        world_size: number of ranks.
        strategy: how the ranks train together.
        steps: optimizer steps.
    """
    settings = tiny_settings(stage, workdir=workdir) | {
        "trainer.max_steps": str(steps),
        "trainer.val_check_interval": str(steps),
        "checkpoint.every_n_steps": str(steps),
        "trainer.timeout_minutes": "5",
        "trainer.log_every_n_steps": "1",
    }
    alone = _train(stage, settings | {"run_dir": str(folder / "one")}, batch=world_size * RANK_BATCH[stage])
    several = settings | {
        "run_dir": str(folder / "several"),
        "trainer.devices": str(world_size),
        "trainer.strategy": strategy,
    }
    ranks = run_distributed(_rank, world_size, stage, several, timeout=900.0)
    means = [sum(values) / world_size for values in zip(*(rank["losses"] for rank in ranks), strict=True)]
    one, other = (_weights(folder / name) for name in ("one", "several"))
    assert one.keys() == other.keys(), f"{stage}: other weights were trained"
    artefacts = [(folder / name / STAGE_ARTEFACTS[stage]).read_bytes() for name in ("one", "several")]
    metrics = alone["metrics"]
    return RankComparison(
        loss_difference=max(abs(a - b) for a, b in zip(alone["losses"], means, strict=True)),
        weight_difference=max(_gap(one[name], other[name]) for name in one),
        weight_size=max(float(value.abs().max()) for value in one.values()),
        weight_moved=max(_gap(one[name], start) for name, start in alone["start"].items()),
        metric_differences={
            name: abs(metrics[name] - ranks[0]["metrics"][name])
            for name in metrics
            if name.startswith("val/")
        },
        losses=tuple(alone["losses"]),
        same_artefact=artefacts[0] == artefacts[1],
    )


def train_ranks(
    stage: str, *, workdir: Path, run_dir: Path, world_size: int, strategy: Strategy, steps: int, every: int
) -> dict[str, Any]:
    """Train a stage on several ranks and return its last checkpoint; goes on where the folder stopped."""
    settings = tiny_settings(stage, workdir=workdir) | {
        "run_dir": str(run_dir),
        "trainer.max_steps": str(steps),
        "trainer.limit_val_batches": "0",
        "trainer.log_every_n_steps": "1",
        "trainer.devices": str(world_size),
        "trainer.strategy": strategy,
        "checkpoint.every_n_steps": str(every),
        "optim.ema_decay": "0.9",
        "optim.warmup_steps": "2",
        "optim.schedule": "constant",  # a run that is to go on does not know yet where a cosine would end
    }
    run_distributed(_rank, world_size, stage, settings, timeout=900.0)
    content: dict[str, Any] = torch.load(list_checkpoints(run_dir / "checkpoints")[-1], weights_only=True)
    return content


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _rank(rank: int, world_size: int, stage: str, settings: dict[str, str]) -> dict[str, Any]:
    del rank, world_size
    result = _train(stage, settings, batch=RANK_BATCH[stage])
    return {"losses": result["losses"], "metrics": result["metrics"]}


def _train(stage: str, settings: dict[str, str], *, batch: int) -> dict[str, Any]:
    words = [f"{key}={value}" for key, value in (settings | {"data.batch_size": str(batch)}).items()]
    config = settle_precision(load_config(stage, overrides=words))
    make_module: Callable[..., Any] = load_class(STAGES[stage].module)
    make_data: Callable[..., Any] = load_class(STAGES[stage].data)
    noted = _Losses()
    with quiet_lightning():
        result = fit(
            config,
            make_module=lambda: make_module(config),
            make_data=lambda: make_data(config),
            extra_callbacks=(noted,),
        )
    return {"losses": noted.values, "start": noted.start, "metrics": result.metrics}


def _weights(run_dir: Path) -> dict[str, Tensor]:
    path = list_checkpoints(run_dir / "checkpoints")[-1]
    content: dict[str, dict[str, Tensor]] = torch.load(path, weights_only=True)
    return {name: value for name, value in content["state_dict"].items() if value.is_floating_point()}
