"""The configuration sections that all stages share, and the checks ``__post_init__`` is written with.

Import these names from ``prefgen.config``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from prefgen.errors import ConfigError

Precision = Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed", "auto"]

FrozenDtype = Literal["float32", "bfloat16", "float16", "auto"]
"""auto is bfloat16 where the device multiplies it in hardware, else float32."""


def given(*values: object) -> bool:
    """Whether all values are final: ``__post_init__`` also sees defaults that are MISSING or ``${..}``."""
    return not any(isinstance(value, str) and (value == MISSING or "${" in value) for value in values)


def require(holds: bool, message: str) -> None:
    """Refuse a relation between keys that does not hold; name every key of it in the message.

    Raises:
        ConfigError: ``holds`` is false.
    """
    if not holds:
        raise ConfigError(message)


def at_least(key: str, value: float | None, *, minimum: float) -> None:
    """Refuse a number under its minimum; ``None`` and values not final yet pass.

    Raises:
        ConfigError: naming the key.
    """
    if value is not None and given(value) and value < minimum:
        raise ConfigError(f"{key}={value} must be at least {minimum}")


@dataclass
class TrainerConfig:
    """Where and how long a stage trains."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind; auto takes a GPU where there is one."""
    devices: int = 1
    """Devices per node."""
    num_nodes: int = 1
    """Nodes of the cluster job."""
    strategy: Literal["auto", "ddp", "fsdp2", "deepspeed"] = "auto"
    """How devices train together: auto is ddp where there are several; fsdp2 shards parameters, gradients and
    optimizer state; deepspeed is handed to Lightning and untested."""
    deepspeed_config: str | None = None
    """DeepSpeed's own json file, for trainer.strategy=deepspeed; null takes its stage 2."""
    timeout_minutes: int = 30
    """Minutes a rank waits for the others before it ends with an error."""
    precision: Precision = "auto"
    """Arithmetic; auto is bf16-mixed where the device multiplies bf16 in hardware, else 32-true; 16-mixed
    needs a GPU."""
    max_steps: int = 1000
    """Optimizer steps in all; -1 leaves the end to trainer.max_epochs."""
    max_epochs: int = -1
    """Passes over the training users in all; -1 leaves the end to trainer.max_steps."""
    accumulate_grad_batches: int = 1
    """Batches per optimizer step."""
    gradient_clip_val: float | None = 1.0
    """Largest gradient norm; null switches clipping off."""
    val_check_interval: int | None = None
    """Training batches between validations; null validates after each epoch."""
    limit_val_batches: int | None = None
    """Most batches in a validation; null uses all, 0 switches validation off."""
    log_every_n_steps: int = 10
    """Steps between two log entries."""
    num_threads: int | None = None
    """Threads of torch on the CPU; null leaves torch's own choice."""
    validate_before_fit: bool = False
    """Validate once before the first step, so that the gain of training can be read off."""

    def __post_init__(self) -> None:
        """Check what must hold between the keys."""
        if given(self.max_steps, self.max_epochs):
            require(
                self.max_steps > 0 or self.max_epochs > 0,
                f"trainer.max_steps={self.max_steps} and trainer.max_epochs={self.max_epochs}: "
                "one of the two must be above 0, or training never ends",
            )
        if given(self.accelerator, self.precision):
            require(
                not (self.accelerator == "cpu" and self.precision == "16-mixed"),
                "trainer.precision=16-mixed needs a GPU, but trainer.accelerator=cpu; "
                "use trainer.precision=bf16-mixed",
            )
        if self.deepspeed_config is not None and given(self.strategy):
            require(
                self.strategy == "deepspeed",
                f"trainer.deepspeed_config={self.deepspeed_config} needs trainer.strategy=deepspeed, "
                f"got {self.strategy}",
            )
        counts = ("devices", "num_nodes", "accumulate_grad_batches", "log_every_n_steps", "num_threads")
        for name in (*counts, "timeout_minutes"):
            at_least(f"trainer.{name}", getattr(self, name), minimum=1)


@dataclass
class OptimConfig:
    """AdamW, its schedule, and when to stop early."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two running means."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine falls to 0 at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    early_stopping_patience: int | None = None
    """Validations without improvement of checkpoint.monitor before training stops; null never stops early."""
    ema_decay: float | None = None
    """Decay of the moving average of the trainable parameters; null keeps none."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("optim.learning_rate", self.learning_rate, minimum=0)
        at_least("optim.weight_decay", self.weight_decay, minimum=0)
        at_least("optim.warmup_steps", self.warmup_steps, minimum=0)
        at_least("optim.early_stopping_patience", self.early_stopping_patience, minimum=1)
        if self.ema_decay is not None and given(self.ema_decay):
            require(0 < self.ema_decay < 1, f"optim.ema_decay={self.ema_decay} must lie between 0 and 1")


@dataclass
class LoaderConfig:
    """How batches are prepared. How many samples they hold is ``data.batch_size``."""

    num_workers: int = 0
    """Worker processes that prepare batches; the order of samples does not depend on it."""
    stall_seconds: int = 600
    """Seconds without a batch after which worker processes count as stuck and the run stops, naming the
    samples; without worker processes it is said and waited on. 0 waits for ever in silence."""
    cache_dir: str = "~/.cache/prefgen"
    """Local folder that holds tar files of shards read from an object store (s3://, gs://, az://, https://)."""
    cache_gb: float = 50.0
    """Most gigabytes of tar files in it; the file used longest ago goes first."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("loader.num_workers", self.num_workers, minimum=0)
        at_least("loader.stall_seconds", self.stall_seconds, minimum=0)
        if given(self.cache_gb):
            require(self.cache_gb > 0, f"loader.cache_gb={self.cache_gb} must be above 0")


@dataclass
class GuardConfig:
    """What a run puts up with before it stops."""

    max_bad_steps: int = 3
    """Optimizer steps, in the whole run, that may be skipped because loss or gradients are NaN or infinite;
    the next one stops the run and names its samples."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("guard.max_bad_steps", self.max_bad_steps, minimum=0)


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_n_steps: int = 200
    """Optimizer steps between two checkpoints."""
    keep_last: int = 2
    """How many of the newest checkpoints stay on disk."""
    monitor: str | None = None
    """Validation metric whose best checkpoint is kept and exported; null exports the last."""
    mode: Literal["min", "max"] = "min"
    """Whether a small or a large checkpoint.monitor is good."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("checkpoint.every_n_steps", self.every_n_steps, minimum=1)
        at_least("checkpoint.keep_last", self.keep_last, minimum=1)
