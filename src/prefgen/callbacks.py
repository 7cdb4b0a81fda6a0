"""What a run does around the training step: seeds, moving average, checkpoints and signals."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from prefgen.checkpoint import checkpoint_name, list_checkpoints
from prefgen.errors import CheckpointError, ConfigError, StoppedBySignalError
from prefgen.requeue import REQUEUE_SIGNAL, under_slurm
from prefgen.stages.sharding import like, whole
from prefgen.whole_file import whole_file

logger = logging.getLogger(__name__)

BEST_NAME = "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so a killed run leaves whole checkpoints only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save under a temporary name, then rename; what could not be written whole is taken away again."""
        del storage_options
        # Not Lightning's own writer, which takes the way over the folder for temporary files.
        with whole_file(Path(path)) as part, part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(part.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power cut could take the name with it
        finally:
            os.close(folder)


class StepSeed(Callback):
    """Seeds torch at a batch from (seed, rank, epoch, batch): dropout survives a resume exactly."""

    def __init__(self, *, seed: int) -> None:
        self._seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Seed from the parts."""
        del pl_module, batch
        parts = f"{self._seed}/{trainer.global_rank}/{trainer.current_epoch}/{batch_idx}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(parts.encode()).digest()[:8], "big") >> 1)


class TrainedEMA(Callback):
    """Moving average of the trained parameters, used in validation and for the artefact, kept in checkpoints.

    The decay rises as ``min(decay, (1 + n) / (10 + n))`` over the first updates n, so that a short run is not
    held back by its random start. Averages are float32 whatever the parameters' type.
    """

    def __init__(self, *, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow: dict[str, Tensor] = {}
        self._step = 0
        self._swapped: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the parameters as they are, or go on from the checkpoint's averages."""
        self._step = trainer.global_step
        trained = _trained(pl_module)
        if not self.shadow:
            self.shadow = {name: p.detach().float().clone() for name, p in trained.items()}
        self._check(trained)
        self.shadow = {name: like(self.shadow[name], p) for name, p in trained.items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Move the averages after each optimizer step."""
        del outputs, batch, batch_idx
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, parameter in _trained(pl_module).items():
            self.shadow[name].lerp_(parameter.detach().float(), 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the averages."""
        if trainer.state.fn == "fit" and self.shadow:
            self._swapped = {name: p.detach().clone() for name, p in _trained(pl_module).items()}
            self.put_into(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on training the parameters themselves."""
        del trainer
        if self._swapped:
            _write(_trained(pl_module), self._swapped)
            self._swapped = {}

    def put_into(self, module: nn.Module) -> None:
        """Overwrite the trained parameters with their averages."""
        trained = _trained(module)
        self._check(trained)
        _write(trained, self.shadow)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "updates": self.updates,
            "shadow": {name: whole(value) for name, value in self.shadow.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's averages."""
        self.updates, self.shadow = state_dict["updates"], dict(state_dict["shadow"])

    def _check(self, trained: dict[str, nn.Parameter]) -> None:
        if trained.keys() != self.shadow.keys():
            raise CheckpointError(
                f"the checkpoint averages {len(self.shadow)} parameters, but {len(trained)} train here; "
                "use the config.yaml of its run folder"
            )


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def _write(targets: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in targets.items():
        parameter.copy_(values[name])


class RunCheckpoint(Callback):
    """Writes checkpoints at optimizer steps, keeps the newest and the best, and stops the run on a signal.

    SIGTERM, Slurm's requeue signal and the first Ctrl-C are answered at the next optimizer step: first a
    checkpoint, then :class:`StoppedBySignalError`. Must be the last callback, so that what it saves is
    complete.
    """

    def __init__(
        self,
        *,
        folder: Path,
        every_n_steps: int,
        keep_last: int,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        stop_at_step: int | None = None,
    ) -> None:
        self.folder = folder
        self.best_score: float | None = None
        self._every, self._keep = every_n_steps, keep_last
        self._monitor, self._mode = monitor, mode
        self._stop_at_step = stop_at_step  # tests stop here as by SIGTERM
        self._step = self._saved_step = 0
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals from here on."""
        del pl_module
        self._step = self._saved_step = trainer.global_step
        try:
            # after Lightning's own handlers, which end a run by an exception between two arbitrary lines
            numbers = [signal.SIGTERM, signal.SIGINT, *([REQUEUE_SIGNAL] if under_slurm() else [])]
            self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        except ValueError:  # not the main thread: no signals to listen for
            self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = number
        # a second signal ends the process at once, in case a step hangs
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save where it is due. Between optimizer steps gradients are half accumulated: never save there."""
        del pl_module, outputs, batch, batch_idx
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        stop = self._signal != 0 or step == self._stop_at_step
        if trainer.world_size > 1:  # any rank's signal stops all of them at one step
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop or step % self._every == 0 or step == trainer.max_steps:
            self._save(trainer)
        if stop:
            name = signal.Signals(self._signal or signal.SIGTERM).name
            path = self.folder / checkpoint_name(step)
            raise StoppedBySignalError(
                f"stopped by {name} after step {step}; checkpoint: {path}",
                signal_number=self._signal or signal.SIGTERM,
                checkpoint=path,
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the checkpoint with the best validation metric."""
        del pl_module
        if self._monitor is None or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        if self._monitor not in metrics:
            raise ConfigError(
                f"checkpoint.monitor={self._monitor} is not measured; metrics: {', '.join(sorted(metrics))}"
            )
        score = float(metrics[self._monitor])
        better = self.best_score is None or (
            score < self.best_score if self._mode == "min" else score > self.best_score
        )
        if better and math.isfinite(score):
            self.best_score = score
            trainer.save_checkpoint(self.folder / BEST_NAME, weights_only=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end wherever it came from."""
        del pl_module
        if trainer.global_step != self._saved_step:
            self._save(trainer)
        self._stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        del trainer, pl_module, exception
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's state."""
        self.best_score = state_dict["best_score"]

    def _save(self, trainer: Trainer) -> None:
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.folder / checkpoint_name(trainer.global_step), weights_only=False)
        if trainer.is_global_zero:
            for old in list_checkpoints(self.folder)[: -self._keep]:
                old.unlink(missing_ok=True)

    def _stop_listening(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
