"""A tiny random multimodal LLM of the real classes, in a folder that ``from_pretrained`` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from prefgen.models.mllm import MLLM
from prefgen.models.mllm_build import MLLMSpec, build_mllm, train_tokenizer

CORPUS = (
    "I like these images. I don't like these images. Does this user like this image? Yes, because of the ",
    "warm palette, line art. No, because of the cold palette. Which of these two images would this user ",
    "choose? first second What does this user like? What does this user dislike? nothing known red blue",
    "Set A: Set B: Which set?",
)


def tiny_mllm(
    path: Path,
    *,
    seed: int = 0,
    image_wrapping: Literal["bare", "stock"] = "bare",
    scale_factor: int = 4,
    texts: tuple[str, ...] = (),
) -> Path:
    """Write the folder and return it. Under 300,000 parameters; 32 px images, one token an image.

    Args:
        path: where to write.
        seed: of the weights.
        image_wrapping: whether the stock processor's tokens stand around an image.
        scale_factor: 4 gives one token an image, 2 gives four.
        texts: more words for the tokenizer.
    """
    tokenizer = train_tokenizer([*CORPUS, *texts] * 4, vocab_size=512)
    spec = MLLMSpec(
        image_size=32,
        patch_size=8,
        scale_factor=scale_factor,
        vision_hidden=24,
        vision_layers=2,
        vision_heads=2,
        text_hidden=48,
        text_layers=4,
        text_heads=4,
        text_intermediate=96,
        max_positions=512,
        image_wrapping=image_wrapping,
    )
    mllm: MLLM = build_mllm(tokenizer, spec=spec, seed=seed)
    mllm.save(path)
    return path
