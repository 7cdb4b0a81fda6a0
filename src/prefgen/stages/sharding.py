"""Parameters that lie in parts on several ranks (FSDP2): cutting them up, and having them whole again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

STEPS = ("training_step", "validation_step", "test_step")


def shard(module: nn.Module, *, mesh: DeviceMesh, blocks: Iterable[nn.Module] = ()) -> None:
    """Cut up all parameters of a module among the ranks of a mesh.

    Args:
        module: a Lightning module, whose steps gather what they need.
        mesh: one-dimensional.
        blocks: submodules that gather and drop their parameters by themselves, each when it is called, so
            that only one of them is whole at a time. Nothing in them is used but through their ``forward``.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # Not dropped after forward: steps go on with parameters behind it. StageModule drops them where no
    # backward does, so that between steps there is one form of every parameter.
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    for name in STEPS:
        register_fsdp_forward_method(module, name)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Layers of transformers models: what is worth sharding one by one.

    They are used through their ``forward`` alone. Not the blocks of a UNet: with user keys and values coming
    from outside of them, gradients came out 2 % off where each was sharded by itself (torch 2.13).
    """
    return [
        part for part in model.modules() if type(part).__name__.endswith(("DecoderLayer", "EncoderLayer"))
    ]


def is_sharded(module: nn.Module) -> bool:
    """Whether :func:`shard` was here."""
    return isinstance(module, FSDPModule)


def drop_gathered(module: nn.Module) -> None:
    """Go back to parts after a step without backward."""
    if isinstance(module, FSDPModule):
        module.reshard()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The module's own parameters whole, outside of a step; all ranks must come here together."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


@torch.no_grad()
def make_trained_whole(module: nn.Module) -> None:
    """Replace sharded parameters that train by whole ones, for export; the module trains no more after it.

    All ranks must come here together.
    """
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.requires_grad and isinstance(parameter, DTensor):
                setattr(owner, name, nn.Parameter(whole(parameter.detach())))


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts; all ranks must come here together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """``value`` on the device of a parameter, cut up as that one is."""
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)
