"""The files of a run folder: config.yaml, inputs.json, metrics.json; and whether a run may go on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

from prefgen.config import StageConfig, is_address, resolve_path, to_yaml
from prefgen.config_keys import Text, read_yaml, read_yaml_text
from prefgen.data.index import index_hash
from prefgen.errors import CheckpointError, ConfigError
from prefgen.lineage import hash_file
from prefgen.stages.base import shard_root
from prefgen.whole_file import write_json

CHANGEABLE = frozenset(
    {
        "trainer.max_steps",
        "trainer.max_epochs",
        "trainer.log_every_n_steps",
        "trainer.num_threads",
        "trainer.timeout_minutes",
        "loader.num_workers",
        "loader.stall_seconds",
        "loader.cache_dir",
        "loader.cache_gb",
        "guard.max_bad_steps",
    }
)
"""Keys that may change when a run goes on. Where the folder lies (workdir, run_dir) is not compared."""

_RANKS = ("trainer.devices", "trainer.num_nodes", "data.batch_size")
"""Keys that may change together while their product, the samples of a step, stays the same."""

_PLACE = frozenset({"workdir", "run_dir"})


def check_same_run(run_dir: Path, *, config: StageConfig) -> None:
    """Refuse to go on in a run folder that was started with another configuration.

    Raises:
        ConfigError: a key differs that may not change, naming it.
        CheckpointError: the folder has no config.yaml.
    """
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        raise CheckpointError(f"{run_dir} has checkpoints but no config.yaml; pass another run_dir=PATH")
    before, now = dict(read_yaml(saved)), dict(read_yaml_text(to_yaml(config), where="the configuration"))
    free = CHANGEABLE | _PLACE | (frozenset(_RANKS) if _same_samples(before, now) else frozenset())
    if {before.get("trainer.strategy"), now.get("trainer.strategy")} <= {"auto", "ddp"}:
        free |= {"trainer.strategy"}  # one form of checkpoint
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in free:
            raise ConfigError(
                f"{run_dir} was started with {key}={_shown(before.get(key))}, now "
                f"{key}={_shown(now.get(key))}; when a run goes on only {', '.join(sorted(CHANGEABLE))} "
                "may change, and devices, nodes and data.batch_size together if their product stays the "
                "same: pass another run_dir=PATH for a new run"
            )


def _same_samples(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether both take the same number of samples a step over all ranks."""
    try:
        one, other = (math.prod(int(str(keys[name])) for name in _RANKS) for keys in (before, now))
    except (KeyError, ValueError):
        return False
    return one == other


def input_hashes(config: StageConfig) -> dict[str, str]:
    """SHA-256 of the file that stands for each input that is there: an index, a LoRA, a projector."""
    hashes = {}
    for needed in config.required_inputs():
        if is_address(needed.path):
            hashes[needed.key] = index_hash(shard_root(needed.path, loader=config.loader))
            continue
        path = resolve_path(needed.path) / needed.member
        if path.is_file():
            hashes[needed.key] = hash_file(path)
    return hashes


def write_inputs(run_dir: Path, *, config: StageConfig) -> None:
    """Remember in inputs.json what the run starts from."""
    write_json(run_dir / "inputs.json", content=input_hashes(config), indent=2, shared=True)


def check_same_inputs(run_dir: Path, *, config: StageConfig) -> None:
    """Refuse to go on, or to call finished, what was trained on inputs that have changed since.

    Without it a run would go on over new embeddings with a projector half fitted to the old ones.

    Raises:
        CheckpointError: an input differs, naming it.
    """
    saved = run_dir / "inputs.json"
    if not saved.is_file():
        return
    before, now = _read_object(saved), input_hashes(config)
    for needed in config.required_inputs():
        if before.get(needed.key) != now.get(needed.key):
            raise CheckpointError(
                f"{run_dir} was started with another {needed.what} ({needed.key}={needed.path} has changed "
                f"since); delete {run_dir} or pass another run_dir=PATH to train anew"
            )


def _shown(value: Text | None) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return "(unset)" if value is None else value


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """metrics.json as it is; empty where there is none yet.

    Raises:
        CheckpointError: the file is no json object.
    """
    path = run_dir / "metrics.json"
    return _read_object(path) if path.is_file() else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is torn ({error}); delete it") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no json object; delete it")
    return cast(dict[str, Any], content)


def write_metrics(run_dir: Path, **figures: Any) -> None:
    """Set entries of metrics.json and keep the others, so that fit, validate and test each add theirs."""
    content = {**read_metrics(run_dir), **figures}
    write_json(run_dir / "metrics.json", content=content, indent=2, sort_keys=True, shared=True)
