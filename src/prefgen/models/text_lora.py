"""An optional LoRA on the text cross-attention of the frozen UNet, in force only where users are.

Not the paper's, which freezes the text cross-attention (method step 4): off by default. Its file is what
stock diffusers loads with ``pipe.load_lora_weights``.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from prefgen.errors import CheckpointError
from prefgen.whole_file import whole_file

TEXT_LORA_FILE = "text_lora.safetensors"
"""Beside ``user_adapter.safetensors`` where one was trained."""

_NAME = "prefgen_text"
_TARGETS = r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)"


def add_text_lora(unet: Any, *, rank: int) -> None:
    """Put a trainable LoRA, float32 and begun as the identity, on every text cross-attention.

    Args:
        unet: frozen; its layers are replaced in place.
        rank: at least 1. Alpha is the rank, so that a loader needs no more than the file.
    """
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS, bias="none"), adapter_name=_NAME
    )
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_text_lora(unet: Any, *, path: Path) -> None:
    """Write ``text_lora.safetensors``, in one piece."""
    state = get_peft_model_state_dict(unet, adapter_name=_NAME)
    plain = {f"unet.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    with whole_file(path) as part:
        part.write_bytes(to_bytes(plain))


def load_text_lora(unet: Any, *, path: Path) -> None:
    """Put a trained one into a UNet, frozen, beside the LoRAs that are active there.

    Raises:
        CheckpointError: the file is torn or was trained for another UNet.
    """
    active = {layer: list(layer.active_adapters) for layer in _lora_layers(unet)}
    try:
        with warnings.catch_warnings():
            # peft warns of a second adapter in one model: it is meant, others' LoRAs draw along.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`", category=UserWarning)
            unet.load_lora_adapter(load_file(path), prefix="unet", adapter_name=_NAME)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"the text LoRA at {path} is torn or does not fit the UNet: {reason}") from None
    # diffusers makes the new one the only active one, in layers too that it does not reach
    for layer in _lora_layers(unet):
        layer.set_adapter([*active.get(layer, ()), *({_NAME} & layer.r.keys())])
        layer.requires_grad_(False)


def switch_text_lora(unet: Any, on: bool) -> None:
    """In force, or without effect to the last bit; a UNet without one stays as it is."""
    for layer in _layers(unet):
        layer.set_scale(_NAME, 1.0 if on else 0.0)


def remove_text_lora(unet: Any) -> None:
    """Give the UNet back the layers it had; other LoRAs stay, and a UNet without ours stays as it is."""
    if not _layers(unet):
        return
    for layer in _lora_layers(unet):
        others = [name for name in layer.active_adapters if name != _NAME]
        layer.set_adapter(others, inference_mode=True)  # peft would choose one of them, with a warning
    unet.delete_adapters(_NAME)
    if not any(layer.r for layer in _lora_layers(unet)):
        unet.unload_lora()
    # peft leaves the layers that only ours was in wrapped: a saved UNet would have other names
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, LoraLayer) and not layer.r:
            unet.set_submodule(name, layer.get_base_layer())


def _layers(unet: torch.nn.Module) -> list[Any]:
    return [layer for layer in _lora_layers(unet) if _NAME in layer.r]


def _lora_layers(unet: torch.nn.Module) -> list[Any]:
    return [module for module in unet.modules() if isinstance(module, LoraLayer)]
