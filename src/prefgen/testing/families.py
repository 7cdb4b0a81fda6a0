"""Tiny random multimodal LLMs of every family's real classes, in folders that ``from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

from prefgen.models.families import FAMILIES, IMAGE_SIDE_KEY, FamilyName
from prefgen.models.mllm import MLLM
from prefgen.models.mllm_build import train_tokenizer
from prefgen.testing.mllm import CORPUS

SIDE, PATCH, LAYERS = 32, 8, 4
STD = 0.15
"""Of the weights: with the usual 0.02 a tiny model's answers hardly depend on its images."""

_CONTENT = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
_IDEFICS = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' }}"
    + _CONTENT.replace("IMAGE", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_CHATML = (
    "SYSTEM{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + _CONTENT
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

_IDEFICS_TOKENS = ("<pad>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>")
_QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
_LLAVA_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>", "<video>")


def tiny_family_mllm(path: Path, *, family: FamilyName, seed: int = 0, texts: tuple[str, ...] = ()) -> Path:
    """Write the folder and return it: four decoder layers, 32 px images, under 300,000 parameters.

    Args:
        path: where to write.
        family: whose classes.
        seed: of the weights.
        texts: more words for the tokenizer.
    """
    tokenizer = _tokenizer(family, texts=texts)
    config = _CONFIGS[family](_text(tokenizer), tokenizer)
    setattr(config, IMAGE_SIDE_KEY, SIDE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family].model_class()(config).eval()
    MLLM.assemble(model, tokenizer=tokenizer, image_processor=_image_processor(family)).save(path)
    return path


def _tokenizer(family: FamilyName, *, texts: tuple[str, ...]) -> Any:
    corpus = [*CORPUS, *texts, "User: Assistant: user assistant system You are a helpful assistant."] * 4
    tokens: tuple[str, ...]
    if family.startswith("qwen"):
        tokens, template = _QWEN_TOKENS, _CHATML.replace("SYSTEM", _SYSTEM)
        template = template.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    elif family == "llava_onevision":
        tokens, template = _LLAVA_TOKENS, _CHATML.replace("SYSTEM", "").replace("IMAGE", "<image>")
        named = {"image_token": "<image>", "video_token": "<video>"}
    else:
        tokens, template = _IDEFICS_TOKENS, _IDEFICS
        named = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
        named |= {"image_boundary_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
        named |= {"end_of_utterance_token": "<end_of_utterance>"}
    return train_tokenizer(
        corpus, vocab_size=512, special_tokens=tokens, named_tokens=named, chat_template=template
    )


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 96,
        "initializer_range": STD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _vision(**sizes: Any) -> dict[str, Any]:
    common = {"hidden_size": 24, "intermediate_size": 48, "patch_size": PATCH, "initializer_range": STD}
    return {**common, **sizes}


def _siglip_like(**sizes: Any) -> dict[str, Any]:
    return _vision(num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, **sizes)


def _token(tokenizer: Any, name: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(name))


def _idefics2(text: dict[str, Any], tokenizer: Any) -> Any:
    perceiver: dict[str, Any] = {
        "hidden_size": 48,
        "resampler_n_latents": 3,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
    }
    perceiver |= {"resampler_head_dim": 12, "num_key_value_heads": 1, "initializer_range": STD}
    return transformers.Idefics2Config(
        text_config={"model_type": "mistral", "sliding_window": None, **text},
        vision_config=_siglip_like(),
        perceiver_config=perceiver,
        image_token_id=_token(tokenizer, "<image>"),
    )


def _idefics3(text: dict[str, Any], tokenizer: Any) -> Any:
    return transformers.Idefics3Config(**_idefics3_parts(text, tokenizer))


def _smolvlm(text: dict[str, Any], tokenizer: Any) -> Any:
    return transformers.SmolVLMConfig(**_idefics3_parts(text, tokenizer))


def _idefics3_parts(text: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **text},
        "vision_config": _siglip_like(),
        "scale_factor": 2,
        "image_token_id": _token(tokenizer, "<image>"),
        "tie_word_embeddings": True,
    }


def _llava_onevision(text: dict[str, Any], tokenizer: Any) -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_siglip_like()},
        image_token_index=_token(tokenizer, "<image>"),
        video_token_index=_token(tokenizer, "<video>"),
        image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
    )


def _qwen_parts(text: dict[str, Any], tokenizer: Any, **vision: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    sizes = {"depth": 3, "num_heads": 2, "spatial_merge_size": 2, "out_hidden_size": 48}
    return {
        "text_config": {**text, "rope_parameters": rope},
        "vision_config": _vision(**sizes, **vision),
        "image_token_id": _token(tokenizer, "<|image_pad|>"),
        "video_token_id": _token(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": _token(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": _token(tokenizer, "<|vision_end|>"),
    }


def _qwen2_5_vl(text: dict[str, Any], tokenizer: Any) -> Any:
    # windows of 16 px hold one merged patch, so that windowed and full attention differ
    parts = _qwen_parts(text, tokenizer, window_size=16, fullatt_block_indexes=[2])
    return transformers.Qwen2_5_VLConfig(**parts)


def _qwen3_vl(text: dict[str, Any], tokenizer: Any) -> Any:
    parts = _qwen_parts(text, tokenizer, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    return transformers.Qwen3VLConfig(**parts)


_CONFIGS: dict[FamilyName, Callable[[dict[str, Any], Any], Any]] = {
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}


def _image_processor(family: FamilyName) -> Any:
    module, _, name = FAMILIES[family].image_processor.partition(":")
    processor = getattr(import_module(f"transformers.models.{module}"), name)
    edge = {"longest_edge": SIDE}
    if family in ("idefics3", "smolvlm"):
        return processor(do_image_splitting=False, size=edge, max_image_size=edge)
    if family == "idefics2":
        return processor(do_image_splitting=False, size={**edge, "shortest_edge": SIDE})
    if family == "llava_onevision":
        pinpoints = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
        return processor(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints)
    pixels = {"shortest_edge": PATCH * PATCH, "longest_edge": SIDE * SIDE}
    return processor(patch_size=PATCH, merge_size=2, size=pixels)
