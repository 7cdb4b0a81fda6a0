"""Whether bf16 is worth its rounding on the device at hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefgen.config import StageConfig
    from prefgen.config_sections import Precision

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""Names torch gives to a CPU's bf16 products: x86 twice, then ARM."""


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 in hardware.

    Elsewhere torch emulates it, and slowly: on a CPU with AVX2 alone a step of the mini UNet took 32 s in
    bf16 and 1.4 s in float32.
    """
    import torch

    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in BF16_INSTRUCTIONS)


def has_fast_bf16(*, accelerator: str = "auto") -> bool:
    """Whether the device that a run takes multiplies bf16 in hardware.

    Args:
        accelerator: ``auto`` (a GPU where there is one), ``cpu`` or ``gpu``.
    """
    import torch

    if accelerator != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return has_bf16_products()


def settle_precision(config: StageConfig) -> StageConfig:
    """The configuration with every ``auto`` of its number formats replaced by what suits the device here."""
    fast = has_fast_bf16(accelerator=config.trainer.accelerator)
    if config.trainer.precision == "auto":
        chosen: Precision = "bf16-mixed" if fast else "32-true"
        config = replace(config, trainer=replace(config.trainer, precision=chosen))
    model: Any = getattr(config, "model", None)
    formats = {name: getattr(model, name, None) for name in ("frozen_dtype", "vae_dtype")}
    settled = {name: "bfloat16" if fast else "float32" for name, found in formats.items() if found == "auto"}
    if settled:
        config = replace(config, model=replace(model, **settled))  # type: ignore[call-arg]
    return config
