"""Typed configuration: shared sections, and how a stage's configuration is put together and checked.

Precedence: dataclass default < configuration file < ``key=value`` on the command line. Text of files and of
the command line is parsed by the declared type of its key and by nothing else, so a ``str`` key keeps its raw
text (YAML alone would turn ``yes`` into ``True`` and ``1e-4`` into ``0.0001``). OmegaConf resolves ``${..}``
last, on the final values, and builds the dataclasses, whose ``__post_init__`` checks relations between keys.
Nothing here imports torch.

A stage's configuration is a plain dataclass derived from :class:`StageConfig`; the string under each field is
its help text. A key without a sensible default is ``MISSING``, never ``None``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefgen.config_keys import ConfigKey, did_you_mean, list_keys, parse_text, read_yaml
from prefgen.errors import ConfigError
from prefgen.stages import STAGES

__all__ = ["MISSING"]

PRESETS = ("mini", "smol", "sd15", "paper")
Precision = Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"]

_PACKAGE = Path(__file__).resolve().parent


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


@dataclass
class TrainerConfig:
    """Where and how long a stage trains."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind; auto takes a GPU where there is one."""
    devices: int = 1
    """Devices per node."""
    num_nodes: int = 1
    """Nodes of the cluster job."""
    strategy: str = "auto"
    """Lightning strategy, e.g. auto or ddp."""
    precision: Precision = "bf16-mixed"
    """Arithmetic; 16-mixed needs a GPU."""
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
        for name in ("devices", "num_nodes", "accumulate_grad_batches", "log_every_n_steps", "num_threads"):
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

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("loader.num_workers", self.num_workers, minimum=0)


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


@dataclass
class DataConfig:
    """Base of every stage's ``data`` section; stages add the paths of their inputs and their draws."""

    batch_size: int = 8
    """Samples per step and device."""

    def __post_init__(self) -> None:
        """Check ranges."""
        at_least("data.batch_size", self.batch_size, minimum=1)


@dataclass(frozen=True, kw_only=True)
class RequiredInput:
    """One input a stage cannot start without; checked before torch is imported.

    Attributes:
        key: the configuration key that holds the path, e.g. ``data.shards``.
        path: its resolved value.
        what: what should lie there, for the message, e.g. ``embedding shards``.
        made_by: the command that makes it, e.g. ``prefgen predict --stage probe workdir=work/x``.
        member: a file that must exist inside the folder, e.g. ``index.json``; empty for the path itself.
    """

    key: str
    path: str
    what: str
    made_by: str
    member: str = ""

    def check(self) -> None:
        """Refuse to go on without the input.

        Raises:
            ConfigError: nothing is there.
        """
        if not (resolve_path(self.path) / self.member).exists():
            raise ConfigError(
                f"no {self.what} at {self.path}; run '{self.made_by}' first or pass {self.key}=PATH"
            )


@dataclass
class StageConfig:
    """What every stage's configuration holds; a stage derives from it and adds its own sections."""

    workdir: str = "work/mini"
    """Folder that all stages share; inputs and outputs lie in it unless their own keys say otherwise."""
    run_dir: str = MISSING
    """Folder of this run: configuration, checkpoints, logs, metrics and the artefact."""
    seed: int = 0
    """Seed of everything that is drawn."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        """Check relations between sections."""
        patience, monitor = self.optim.early_stopping_patience, self.checkpoint.monitor
        require(
            patience is None or monitor is not None,
            f"optim.early_stopping_patience={patience} needs checkpoint.monitor=METRIC to watch",
        )

    def required_inputs(self) -> tuple[RequiredInput, ...]:
        """The inputs without which the stage cannot start."""
        return ()


def at_least(key: str, value: float | None, *, minimum: float) -> None:
    """Refuse a number under its minimum; ``None`` and values not final yet pass.

    Raises:
        ConfigError: naming the key.
    """
    if value is not None and given(value) and value < minimum:
        raise ConfigError(f"{key}={value} must be at least {minimum}")


def load_config(
    stage: str, *, preset: str = "mini", file: Path | None = None, overrides: Iterable[str] = ()
) -> StageConfig:
    """Put a stage's configuration together and check it.

    Args:
        stage: a name of ``STAGES``.
        preset: which ``configs/<preset>/<stage>.yaml`` to start from when no file is given.
        file: a configuration file that replaces the preset's.
        overrides: ``key=value`` tokens, the last word.

    Returns:
        The stage's own dataclass with every ``${..}`` resolved.

    Raises:
        ConfigError: unknown stage, preset, key or choice; a value of the wrong type; a key given twice; a
            required key without a value; a relation between keys that does not hold.
    """
    config_type = stage_config_type(stage)
    path = file if file is not None else preset_file(stage, preset=preset)
    return build_config(config_type, where=f"for stage '{stage}'", file=path, overrides=overrides)


def build_config(
    config_type: type[StageConfig], *, where: str, file: Path | None, overrides: Iterable[str] = ()
) -> StageConfig:
    """``load_config`` for a configuration type at hand; ``where`` ends the message on an unknown key."""
    keys = {key.name: key for key in list_keys(config_type)}
    config = OmegaConf.structured(config_type)
    given_values = [] if file is None else [(k, v, f"{file}: ") for k, v in read_yaml(file)]
    given_values += [(key, value, "") for key, value in split_overrides(overrides)]
    try:
        for name, text, source in given_values:
            if name not in keys:
                raise ConfigError(f"{source}unknown key '{name}' {where}.{did_you_mean(name, among=keys)}")
            OmegaConf.update(config, name, parse_text(text, key=keys[name], source=source))
        return cast(StageConfig, _finish(config))
    except OmegaConfBaseException as error:
        name = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{name}{str(error).splitlines()[0]}") from None


def _finish(config: Any) -> object:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} is required; pass {missing[0]}=VALUE")
    OmegaConf.resolve(config)
    return OmegaConf.to_object(config)


def split_overrides(tokens: Iterable[str]) -> list[tuple[str, str]]:
    """``key=value`` tokens as pairs.

    Raises:
        ConfigError: a token has dashes or no ``=`` (OmegaConf would set the key to None), or a key comes
            twice (the last would win silently).
    """
    pairs: dict[str, str] = {}
    for token in tokens:
        if token.startswith("-"):
            raise ConfigError(f"overrides are written without dashes: {token.lstrip('-')}")
        key, equals, value = token.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{token}' is not an override; write key=value, e.g. trainer.max_steps=100")
        if key in pairs:
            raise ConfigError(f"{key} is given twice: {key}={pairs[key]} and {token}; keep one")
        pairs[key] = value
    return list(pairs.items())


def stage_config_type(stage: str) -> type[StageConfig]:
    """The configuration dataclass of a stage.

    Raises:
        ConfigError: there is no such stage.
    """
    if stage not in STAGES:
        raise ConfigError(
            f"unknown stage '{stage}'; stages: {', '.join(STAGES)}.{did_you_mean(stage, among=STAGES)}"
        )
    module, _, name = STAGES[stage].config.partition(":")
    return cast(type[StageConfig], getattr(import_module(module), name))


def stage_keys(stage: str) -> list[ConfigKey]:
    """Every key of a stage with its type, default and help text."""
    return list_keys(stage_config_type(stage))


def configs_folder() -> Path:
    """Where the presets lie: inside an installed wheel, or at the root of a checkout."""
    shipped = _PACKAGE / "configs"
    return shipped if shipped.is_dir() else _PACKAGE.parents[1] / "configs"


def preset_file(stage: str, *, preset: str) -> Path:
    """The file of a preset for a stage.

    Raises:
        ConfigError: there is no such preset, or it has no file for this stage yet.
    """
    if preset not in PRESETS:
        raise ConfigError(
            f"unknown preset '{preset}'; presets: {', '.join(PRESETS)}.{did_you_mean(preset, among=PRESETS)}"
        )
    path = configs_folder() / preset / f"{stage}.yaml"
    if not path.is_file():
        ready = [name for name in PRESETS if (configs_folder() / name / f"{stage}.yaml").is_file()]
        raise ConfigError(
            f"preset '{preset}' has no configuration for stage '{stage}' yet; "
            f"presets that have: {', '.join(ready) or 'none'}; or pass --config FILE"
        )
    return path


def resolve_path(path: str) -> Path:
    """A path of the configuration as a file path; ``asset:mini/clip`` is a folder shipped with prefgen.

    Raises:
        ConfigError: the asset path leaves the assets' folder.
    """
    prefix = "asset:"
    if not path.startswith(prefix):
        return Path(path).expanduser()
    assets = _PACKAGE / "assets"
    resolved = (assets / path.removeprefix(prefix)).resolve()
    if not resolved.is_relative_to(assets):
        raise ConfigError(f"{path!r} leaves the folder of shipped assets; write asset:PRESET/PART")
    return resolved


def to_plain(config: StageConfig) -> dict[str, Any]:
    """A configuration as dicts, lists, text and numbers only: what may go into a checkpoint."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(asdict(config)), resolve=True))


def to_yaml(config: StageConfig) -> str:
    """A configuration as YAML text that ``--config`` reads back."""
    return str(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
