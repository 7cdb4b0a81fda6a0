"""Checkpoints that hold trained parts only, and the checks that make loading one safe.

A checkpoint with the frozen parts inside would weigh gigabytes and hide which base it belongs to. So only
what trains is stored, and loading checks that what is absent is exactly what is frozen.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from prefgen.errors import CheckpointError

logger = logging.getLogger(__name__)

REFUSED_SUFFIX = ".refused"
"""Ending of the name under which a checkpoint that cannot be used is set aside."""

_STEP_NAME = re.compile(r"step-(\d+)\.ckpt")


def stored_names(module: nn.Module) -> frozenset[str]:
    """Names of the state-dict entries that a checkpoint of ``module`` holds.

    These are the parameters that require gradients, and the buffers that belong to them: a buffer goes with
    the nearest enclosing module that has parameters, and is stored if any of those trains.
    """
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    everything = dict(module.named_parameters())
    buffers = dict(module.named_buffers()).keys() & module.state_dict().keys()
    return frozenset(trained | {name for name in buffers if _goes_with(name, everything) in ("", "trained")})


def _goes_with(buffer: str, parameters: dict[str, nn.Parameter]) -> str:
    """``trained`` or ``frozen`` by the nearest enclosing module with parameters; empty without any."""
    owner = buffer
    while owner:
        owner = owner.rpartition(".")[0]
        inside = [p for name, p in parameters.items() if not owner or name.startswith(f"{owner}.")]
        if inside:
            return "trained" if any(p.requires_grad for p in inside) else "frozen"
    return ""


def keep_trained(state_dict: dict[str, Tensor], *, module: nn.Module) -> dict[str, Tensor]:
    """The entries of a state dict that a checkpoint holds."""
    kept = stored_names(module)
    return {name: value for name, value in state_dict.items() if name in kept}


def check_trained(state_dict: dict[str, Tensor], *, module: nn.Module, where: str) -> None:
    """Refuse a state dict unless what it misses is exactly the frozen part of ``module``, shapes included.

    Args:
        state_dict: what was read.
        module: what it is about to be loaded into.
        where: the file, for the message.

    Raises:
        CheckpointError: a trained entry is absent, an entry is unknown or frozen here, or a shape differs.
    """
    expected, own = stored_names(module), module.state_dict()
    if absent := sorted(expected - state_dict.keys()):
        raise CheckpointError(
            f"{where} lacks {len(absent)} trained tensors, first {absent[0]}: "
            "it was made with another configuration; use the config.yaml beside it"
        )
    if foreign := sorted(state_dict.keys() - expected):
        raise CheckpointError(
            f"{where} holds {len(foreign)} tensors that do not train here, first {foreign[0]}: "
            "it was made with another configuration; use the config.yaml beside it"
        )
    for name in sorted(expected):
        got, wanted = tuple(state_dict[name].shape), tuple(own[name].shape)
        if got != wanted:
            raise CheckpointError(
                f"{where}: {name} has shape {got}, but this configuration needs {wanted}; "
                "use the config.yaml beside it"
            )


@torch.no_grad()
def put_trained(state_dict: dict[str, Tensor], *, module: nn.Module) -> None:
    """Copy a state dict that :func:`check_trained` has let pass into the module.

    Not ``load_state_dict``, whose hooks would look for the parts of parameters that fsdp2 had cut up before.
    """
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in state_dict.items():
        own[name].copy_(value)


def read_checkpoint(path: Path, *, stage: str) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Raises:
        CheckpointError: the file is absent, torn, needs code to load, or is not of this stage.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; run 'prefgen fit --stage {stage}' first")
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torn zip, truncated stream and refused classes come as different types from torch
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read ({reason}): it is torn or no checkpoint; delete it"
        ) from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path} is no prefgen checkpoint: it has no state_dict; delete or move it")
    found = content.get("hyper_parameters", {}).get("stage")
    if found != stage:
        raise CheckpointError(
            f"{path} belongs to stage {found!r}, not {stage!r}; pass run_dir=PATH of a {stage} run"
        )
    return cast(dict[str, Any], content)


def _check_sums(path: Path) -> None:
    """torch.load does not compare the checksums that its files carry: a flipped bit would train on."""
    with zipfile.ZipFile(path) as file:
        bad = file.testzip()
    if bad is not None:
        raise zipfile.BadZipFile(f"its part {bad} fails its checksum")


def newest_usable(
    found: Sequence[Path], *, module: nn.Module, stage: str, set_aside: bool = False
) -> tuple[Path, dict[str, Any]]:
    """The newest of some checkpoints that is whole and fits a module; others are refused with words.

    Args:
        found: checkpoints, oldest first; at least one.
        module: what it is to be loaded into.
        stage: whose it must be.
        set_aside: rename refused ones, so that nothing picks them again; for the process that writes.

    Raises:
        CheckpointError: none can be used; the newest one's reason.
    """
    first: CheckpointError | None = None
    for path in reversed(found):
        try:
            content = read_checkpoint(path, stage=stage)
            check_trained(content["state_dict"], module=module, where=str(path))
        except CheckpointError as error:
            first = first or error
            if path != found[0]:
                logger.warning("%s; the checkpoint before it is tried", error)
            continue
        if set_aside and first is not None:
            for refused in found[found.index(path) + 1 :]:
                refused.rename(refused.with_name(refused.name + REFUSED_SUFFIX))
                logger.warning("set aside as %s%s", refused, REFUSED_SUFFIX)
        return path, content
    assert first is not None, "no checkpoints to choose from"
    raise first


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}.ckpt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The step checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step-*.ckpt") if _STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)
