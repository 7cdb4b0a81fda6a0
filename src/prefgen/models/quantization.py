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
