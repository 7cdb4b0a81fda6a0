"""The configuration section about the frozen multimodal LLM, which stages vqa and probe share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefgen.config_sections import FrozenDtype, require


@dataclass
class MLLMConfig:
    """Which multimodal LLM, and in which form it is held."""

    mllm: str = "asset:mini/mllm"
    """Folder or hub id of the multimodal LLM."""
    family: Literal[
        "auto", "idefics2", "idefics3", "smolvlm", "llava_onevision", "qwen2_5_vl", "qwen3_vl"
    ] = "auto"
    """Family the MLLM has to be of; auto reads it from its config.json."""
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "eager"
    """Attention code; eager is the fastest on a CPU, sdpa on a GPU. The flash ones need their package and
    bf16; packed questions then share cached keys and values instead of a mask."""
    frozen_dtype: FrozenDtype = "float32"
    """Number format of the frozen weights; auto is bfloat16 where the device multiplies it in hardware, else
    float32."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 holds the language model's linear layers in 4 bits (QLoRA; needs prefgen[qlora]), all else in
    model.frozen_dtype."""

    def __post_init__(self) -> None:
        """Check relations."""
        flash = self.attention.startswith("flash")
        require(
            not (flash and self.frozen_dtype == "float32"),
            f"model.attention={self.attention} takes half precision only; set model.frozen_dtype=bfloat16",
        )
