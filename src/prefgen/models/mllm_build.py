"""A fresh multimodal LLM of the Idefics3 classes: tokenizer from a corpus, random weights, processor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from prefgen.models.families import IMAGE_WRAPPING_KEY
from prefgen.models.mllm import MLLM

SPECIAL_TOKENS = (
    "<pad>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<user>",
    "<assistant>",
)

NAMED_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "user_token": "<user>",
    "assistant_token": "<assistant>",
}
"""Names under which the stock processors look for them."""

# One token for each turn keeps six questions behind one history short.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<end_of_utterance>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class MLLMSpec:
    """Sizes of a fresh model. ``scale_factor = image_size / patch_size`` gives ONE token an image.

    Attributes:
        attention: on a CPU core "eager" with heads of 64 trains 1.9 times as fast as "sdpa" with heads of 32.
        image_wrapping: "bare" puts nothing around an image's tokens, "stock" what the stock processor writes.
    """

    image_size: int = 64
    patch_size: int = 8
    scale_factor: int = 8
    vision_hidden: int = 192
    vision_layers: int = 4
    vision_heads: int = 6
    text_hidden: int = 256
    text_layers: int = 8
    text_heads: int = 4
    text_intermediate: int = 768
    max_positions: int = 2048
    attention: Literal["eager", "sdpa"] = "eager"
    image_wrapping: Literal["bare", "stock"] = "bare"


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int = 2048,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    named_tokens: Mapping[str, str] = NAMED_TOKENS,
    chat_template: str = CHAT_TEMPLATE,
) -> Any:
    """Byte-level BPE over a corpus; the first two special tokens are padding and the end of a turn."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=special_tokens[0],
        eos_token=special_tokens[1],
        extra_special_tokens=dict(named_tokens),
        chat_template=chat_template,
    )


def build_mllm(tokenizer: Any, *, spec: MLLMSpec, seed: int) -> MLLM:
    """Random weights drawn from ``seed``; the global generator is left as it was."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.text_hidden,
        intermediate_size=spec.text_intermediate,
        num_hidden_layers=spec.text_layers,
        num_attention_heads=spec.text_heads,
        num_key_value_heads=spec.text_heads,
        max_position_embeddings=spec.max_positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    vision = Idefics3VisionConfig(
        hidden_size=spec.vision_hidden,
        intermediate_size=4 * spec.vision_hidden,
        num_hidden_layers=spec.vision_layers,
        num_attention_heads=spec.vision_heads,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
    )
    config = Idefics3Config(
        text_config=text,
        vision_config=vision,
        scale_factor=spec.scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        attn_implementation=spec.attention,
        **{IMAGE_WRAPPING_KEY: spec.image_wrapping},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config)
    side = {"longest_edge": spec.image_size}
    processor = Idefics3ImageProcessorPil(do_image_splitting=False, size=side, max_image_size=side)
    return MLLM.assemble(model.eval(), tokenizer=tokenizer, image_processor=processor)


def random_twin(mllm: MLLM, *, seed: int) -> MLLM:
    """The same classes, sizes, tokenizer and prompts with fresh random weights: the control of a study."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mllm.family.model_class()(mllm.model.config).eval()
    return MLLM.assemble(
        model, tokenizer=mllm.tokenizer, image_processor=mllm.image_processor, sharing=mllm.sharing
    )
