"""Guards around the training step: losses that are no numbers, and failures of the machine in plain words."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision.amp import MixedPrecision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prefgen.config import StageConfig, to_plain
from prefgen.errors import PrefgenError, is_disk_full

logger = logging.getLogger(__name__)

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
_LOST_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Wait timeout",
    "Socket Timeout",
    "NCCL",
)
MAX_NAMED = 8
"""Sample keys named in a message, at most."""


class StepGuard(Callback):
    """Logs the norm of the gradients, and skips optimizer steps whose loss or gradients are not finite.

    A skipped step moves no weight and no moment of the optimizer; the schedule and the step count go on. All
    ranks skip together. After ``max_bad_steps`` of them, over the whole run, the next one stops it. Under
    16-mixed the gradients are the gradient scaler's affair, who skips by itself: only the loss is looked at.
    """

    def __init__(self, *, max_bad_steps: int) -> None:
        self.bad_steps = 0
        self._max = max_bad_steps
        self._keys: tuple[str, ...] = ()
        self._bad: list[tuple[float, tuple[str, ...]]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Remember whose samples these are."""
        del trainer, pl_module, batch_idx
        self._keys = sample_keys(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss of each batch."""
        del trainer, pl_module
        if not bool(torch.isfinite(loss.detach()).all()):
            self._bad.append((float(loss.detach()), self._keys))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the gradients, and take them away where they or the loss are no numbers.

        Raises:
            PrefgenError: that happened more often than allowed.
        """
        norm = gradient_norm(pl_module)
        bad = bool(self._bad) or not (_has_scaler(trainer) or bool(torch.isfinite(norm)))
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if not bad:
            pl_module.log("train/grad_norm", norm, batch_size=1)
            return
        found, self._bad = self._bad, []
        self.bad_steps += 1
        words = _describe(found, norm=float(norm), keys=self._keys, step=trainer.global_step)
        if self.bad_steps > self._max:
            raise PrefgenError(
                f"{words}; that is bad step {self.bad_steps} and guard.max_bad_steps={self._max}; lower "
                "optim.learning_rate or trainer.gradient_clip_val, or use trainer.precision=32-true"
            )
        logger.warning("%s; skipped (%d of at most %d)", words, self.bad_steps, self._max)
        optimizer.zero_grad(set_to_none=True)  # without gradients an optimizer step changes nothing

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"bad_steps": self.bad_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.bad_steps = state_dict["bad_steps"]


def _describe(
    found: list[tuple[float, tuple[str, ...]]], *, norm: float, keys: tuple[str, ...], step: int
) -> str:
    names = [key for _, own in found for key in own] or list(keys)
    shown = ", ".join(names[:MAX_NAMED]) + (
        f" and {len(names) - MAX_NAMED} more" if names[MAX_NAMED:] else ""
    )
    what = f"the loss is {found[0][0]:.4g}" if found else f"the gradient's norm is {norm:.4g}"
    return f"{what} at step {step} (samples: {shown or 'unknown'})"


def gradient_norm(module: nn.Module) -> Tensor:
    """Norm of all gradients as one 0-dim float32 tensor; of sharded gradients over all ranks."""
    gradients = [p.grad.detach() for p in module.parameters() if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()


def _has_scaler(trainer: Trainer) -> bool:
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None


def sample_keys(batch: object) -> tuple[str, ...]:
    """Whose samples a batch holds: its ``keys`` or ``user_ids``, or the texts of a (tensors, keys) pair."""
    for name in ("keys", "user_ids"):
        found = getattr(batch, name, None)
        if isinstance(found, tuple | list):
            return tuple(str(key) for key in found)
    if isinstance(batch, tuple | list):
        for part in batch:
            if isinstance(part, tuple | list) and part and all(isinstance(key, str) for key in part):
                return tuple(part)
    return ()


def as_user_error(error: BaseException, *, config: StageConfig) -> PrefgenError | None:
    """A full disk, too little memory or a lost rank as one line; None for anything else."""
    text = " ".join(str(error).split())
    if is_disk_full(error):
        place = getattr(error, "filename", None) or config.run_dir
        return PrefgenError(
            f"the disk is full ({place}); nothing half written was left and the last checkpoint in "
            f"{config.run_dir}/checkpoints is whole: free some space, then run the same command again"
        )
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)
    ):
        return PrefgenError(f"out of memory ({text[:160]}); {memory_advice(config)}")
    lost = isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _LOST_RANK)
    )
    if lost and torch.distributed.is_initialized():
        return PrefgenError(
            f"another rank died or hangs ({text[:160]}); its own error stands in its own output. Run the "
            "same command again to go on from the last checkpoint"
        )
    return None


def memory_advice(config: StageConfig) -> str:
    """The settings of this stage that would take less memory, with their values now."""
    plain = to_plain(config)
    wanted = [
        ("data", "batch_size", None),
        ("data", "rows_per_pass", None),
        ("data", "max_cached", None),
        ("embed", "users_per_pass", None),
        ("trainer", "precision", "bf16-mixed"),
        ("model", "frozen_dtype", "bfloat16"),
        ("model", "gradient_checkpointing", True),
        ("data", "cache", "disk"),
        ("data", "cache_features", "none"),
        ("loader", "num_workers", 0),
    ]
    lower, switch = [], []
    for section, key, value in wanted:
        now = plain.get(section, {}).get(key)
        if now is None or now == value or (value is None and now <= 1):
            continue
        if value is None:
            lower.append(f"{section}.{key}={now}")
        else:
            switch.append(f"{section}.{key}={str(value).lower()}")
    steps = f"lower {', '.join(lower)}" if lower else ""
    others = f"set {', '.join(switch)}" if switch else ""
    keep = "trainer.accumulate_grad_batches keeps the samples a step where the batch shrinks"
    return "; ".join(part for part in (steps, others, keep) if part)
