"""4-bit weights for QLoRA, through bitsandbytes: an extra that is asked for only where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from prefgen.errors import CheckpointError

Quantization = Literal["none", "nf4"]


def quantization_config(kind: Quantization, *, dtype: torch.dtype, skipped: Sequence[str]) -> Any:
    """What ``from_pretrained`` is told.

    Args:
        kind: "nf4", 4-bit normal floats with quantized scales (arXiv 2305.14314).
        dtype: in which the layers compute, and that of all weights that stay whole.
        skipped: parts that stay whole: the vision tower, whose features are computed once, and the head.

    Raises:
        CheckpointError: bitsandbytes is not installed.
    """
    assert kind == "nf4"
    if find_spec("bitsandbytes") is None:
        raise CheckpointError(
            "model.quantization=nf4 needs bitsandbytes, which is not installed; "
            "run \"pip install 'prefgen[qlora]'\" or use model.quantization=none"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(skipped),
    )


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes 0.50 from repacking weights on a CPU.

    With AVX512-bf16 it turns a layer's weights into a form for inference only, in place, as soon as the layer
    is in evaluation mode and its input needs no gradient: that is the case of a frozen model under LoRA.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
