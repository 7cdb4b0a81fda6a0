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
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefgen.config_keys import ConfigKey, did_you_mean, list_keys, parse_text, read_yaml
from prefgen.config_sections import (
    CheckpointConfig,
    GuardConfig,
    LoaderConfig,
    OptimConfig,
    TrainerConfig,
    at_least,
    given,
    require,
)
from prefgen.errors import ConfigError
from prefgen.stages import STAGES

__all__ = [
    "MISSING",
    "CheckpointConfig",
    "DataConfig",
    "GuardConfig",
    "LoaderConfig",
    "OptimConfig",
    "RequiredInput",
    "StageConfig",
    "TrainerConfig",
    "at_least",
    "given",
    "load_config",
    "require",
    "resolve_path",
]

PRESETS = ("mini", "smol", "sd15", "sdxl", "paper")

_PACKAGE = Path(__file__).resolve().parent


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
        if is_address(self.path):
            return  # the reader asks the object store, with words of its own
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
    guard: GuardConfig = field(default_factory=GuardConfig)

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
    config = _blank(config_type)
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


_BLANKS: dict[type[StageConfig], Any] = {}


def _blank(config_type: type[StageConfig]) -> Any:
    """A configuration of nothing but defaults, kept: making one takes six times as long as a copy."""
    if config_type not in _BLANKS:
        _BLANKS[config_type] = OmegaConf.structured(config_type)
    return deepcopy(_BLANKS[config_type])


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


def is_address(path: str) -> bool:
    """Whether a path of the configuration lies in an object store; only shards and embeddings may."""
    return "://" in path


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
