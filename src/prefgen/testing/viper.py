"""A tiny random ViPer proxy of the real classes, in the layout of its published adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from transformers import Idefics2ForConditionalGeneration

from prefgen.evaluate.viper import BASE
from prefgen.testing.families import tiny_family_mllm

_TARGETS = (
    r".*(text_model|modality_projection|perceiver_resampler).*"
    r"(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"
)
"""Where the published LoRA sits."""


def save_tiny_viper(folder: Path, *, seed: int = 0) -> Path:
    """Write a random LoRA and, in ``base/``, a tiny Idefics2; return the folder."""
    words = ("Assistant: +", "Assistant: -", "Score for this image?")
    base = tiny_family_mllm(folder / BASE, family="idefics2", seed=seed, texts=words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics2ForConditionalGeneration.from_pretrained(base)
        model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=_TARGETS))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # starts at zero, where LoRA would change nothing
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder
