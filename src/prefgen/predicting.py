"""``prefgen predict``: in one process, or each rank its part and then one merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer

from prefgen.config import resolve_path
from prefgen.data.parts import Part, merge_parts
from prefgen.stages.base import StageModule


def predict(trainer: Trainer, *, module: StageModule, data: LightningDataModule) -> Path:
    """Let a module with loaded weights write what it predicts.

    Several ranks (trainer.devices, torchrun, Slurm) write a part each; the parts are the files that one
    process would have written, and rank 0 merges their indexes when all are done.

    Returns:
        Where the result went.
    """
    if trainer.world_size == 1:
        return _predict(trainer, module=module, data=data)
    launcher = trainer.strategy.launcher
    if launcher is None:
        return _on_rank(trainer, module=module, data=data)
    place: Path = launcher.launch(_on_rank, trainer, module=module, data=data)
    return place


def _on_rank(trainer: Trainer, *, module: StageModule, data: LightningDataModule) -> Path:
    strategy: Any = trainer.strategy
    strategy.setup_environment()
    part = Part(number=trainer.global_rank, count=trainer.world_size)
    place = _predict(trainer, module=module, data=data, part=part)
    strategy.barrier("every rank has written its part")
    if trainer.is_global_zero:
        merge_parts(resolve_path(str(place)), count=part.count)
    strategy.barrier("the parts are merged")
    return place


def _predict(
    trainer: Trainer, *, module: StageModule, data: LightningDataModule, part: Part | None = None
) -> Path:
    data.prepare_data()
    data.setup("predict")
    plugin = trainer.precision_plugin
    module = plugin.convert_module(module).to(trainer.strategy.root_device).eval()
    with torch.inference_mode(), plugin.forward_context():
        return module.predict(data) if part is None else module.predict(data, part=part)
