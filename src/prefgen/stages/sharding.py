"""Parameters that lie in parts on several ranks (FSDP2): cutting them up, and having them whole again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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
    # Resharded after each step, so that between steps there is one form of every parameter.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for name in STEPS:
        register_fsdp_forward_method(module, name)


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a transformers model: what is worth sharding one by one."""
    return [
        part for part in model.modules() if type(part).__name__.endswith(("DecoderLayer", "EncoderLayer"))
    ]


def frozen_blocks(unet: Any) -> list[nn.Module]:
    """The down, middle and up blocks of a diffusers UNet in which nothing trains."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return [b for b in blocks if b is not None and not any(p.requires_grad for p in b.parameters())]


def is_sharded(module: nn.Module) -> bool:
    """Whether :func:`shard` was here."""
    return isinstance(module, FSDPModule)


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
