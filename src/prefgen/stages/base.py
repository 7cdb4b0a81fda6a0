"""What all stages share: optimizer and schedule, and checkpoints that hold trained parts only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from prefgen.checkpoint import check_trained, keep_trained
from prefgen.config import LoaderConfig, StageConfig, is_address, resolve_path, to_plain
from prefgen.data.parts import WHOLE, Part
from prefgen.data.remote import RemoteFolder
from prefgen.errors import ConfigError
from prefgen.stages.sharding import drop_gathered, is_sharded, repeated_blocks, shard


class StageModule(LightningModule):
    """Base of the four stages' modules.

    A stage's module is built as ``XModule(config)``, names itself in ``stage``, freezes what does not train
    (``requires_grad_(False)``) before it returns from ``__init__``, and offers the ordinary Lightning steps.
    ``optim.ema_decay``, checkpoints, resume and metrics.json are run.py's and need no code in a stage. A
    checkpoint is written before the module's own ``on_train_batch_end``: what has to survive a resume is
    changed in ``training_step``.
    """

    stage: ClassVar[str]
    """The stage's name in ``STAGES``."""
    shards_layers: ClassVar[bool] = True
    """Whether fsdp2 gathers transformer layers one by one: every rank must then call each equally often."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints lack the frozen part; on_load_checkpoint is stricter
        self._stage_config = config
        # Only plain values: a dataclass or Path here would make the checkpoint unloadable with weights_only.
        self.save_hyperparameters({"stage": self.stage, "config": to_plain(config)})

    @property
    def run_dir(self) -> Path:
        """The run folder, where a stage puts its artefact and pictures."""
        return Path(self._stage_config.run_dir)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def configure_model(self) -> None:
        """Cut the parameters up where trainer.strategy=fsdp2 asks for it; Lightning may call this twice."""
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None and not is_sharded(self):
            blocks = repeated_blocks(self) if self.shards_layers else ()
            shard(self, mesh=mesh["data_parallel"], blocks=blocks)

    def on_validation_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Between steps parameters lie in parts, where they do."""
        del outputs, batch, batch_idx
        drop_gathered(self)

    def on_test_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Likewise."""
        del outputs, batch, batch_idx
        drop_gathered(self)

    def mean_share(self, count: int) -> float:
        """Factor on a mean over ``count`` things here that makes the ranks' average the mean over all.

        1 in a run of one process. All ranks must ask together.
        """
        world_size = int(self.trainer.world_size)
        if world_size == 1:
            return 1.0
        total = self.trainer.strategy.reduce(torch.tensor(float(count), device=self.device), reduce_op="sum")
        return count * world_size / max(1.0, float(total))

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule over the trained parameters, from the ``optim`` section."""
        optim = self._stage_config.optim
        return build_optimizer(
            self.trained_parameters(),
            learning_rate=optim.learning_rate,
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            schedule=optim.schedule,
            warmup_steps=optim.warmup_steps,
            total_steps=int(self.trainer.estimated_stepping_batches),
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained part only."""
        checkpoint["state_dict"] = keep_trained(checkpoint["state_dict"], module=self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose absent entries are not exactly the frozen part.

        Raises:
            CheckpointError: it was made with another configuration.
        """
        if is_sharded(self) and "state_dict" not in checkpoint:
            return  # fsdp2 has put the weights in already; run.py has checked them before
        check_trained(checkpoint["state_dict"], module=self, where=f"the {self.stage} checkpoint")

    def export(self, run_dir: Path) -> Path | None:
        """Write the stage's artefact into the run folder after training; called with EMA weights in place.

        Returns:
            The artefact's path inside ``run_dir``, printed when the fit ends; None for a stage without one.
        """
        del run_dir
        return None

    def predict(self, data: LightningDataModule, *, part: Part = WHOLE) -> Path:
        """Write what the stage predicts (``prefgen predict``); its weights are loaded already.

        Args:
            data: the stage's.
            part: which part of the work is this process's; parts are merged afterwards.

        Returns:
            Where the result went.

        Raises:
            ConfigError: the stage predicts nothing.
        """
        del data, part
        raise ConfigError(f"stage '{self.stage}' has nothing to predict; 'prefgen predict' is for probe")


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    schedule: Literal["constant", "cosine"] = "constant",
    warmup_steps: int = 0,
    total_steps: int,
) -> dict[str, Any]:
    """AdamW with a per-step schedule, in the form Lightning's ``configure_optimizers`` returns.

    Args:
        parameters: what to train.
        learning_rate: peak rate.
        weight_decay: decoupled decay.
        betas: AdamW's running means.
        schedule: the rate after the warm-up; cosine reaches 0 at ``total_steps``.
        warmup_steps: steps of linear rise.
        total_steps: optimizer steps in all.
    """
    optimizer = torch.optim.AdamW(
        list(parameters), lr=learning_rate, weight_decay=weight_decay, betas=(betas[0], betas[1])
    )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if schedule == "constant":
            return 1.0
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def shard_root(path: str, *, loader: LoaderConfig) -> Path | RemoteFolder:
    """A folder of shards as a configuration names it: on this machine, or in an object store.

    Raises:
        DataError: an address of a kind that is not read.
    """
    if not is_address(path):
        return resolve_path(path)
    cache = Path(loader.cache_dir).expanduser()
    return RemoteFolder(path, cache=cache, max_bytes=int(loader.cache_gb * 1e9))


@contextmanager
def rank_zero_first(trainer: Trainer | None) -> Iterator[None]:
    """Rank 0 does what is inside, then the others, who find its files; within trainer.timeout_minutes."""
    if trainer is None or trainer.world_size == 1:
        yield
        return
    if not trainer.is_global_zero:
        trainer.strategy.barrier("rank 0 goes first")
    yield
    if trainer.is_global_zero:
        trainer.strategy.barrier("rank 0 goes first")
