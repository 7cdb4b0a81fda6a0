"""A tiny random Llama in a GGUF file, quantized as SmolLM2's is, and the same model built without that file.

Writing needs the package ``gguf``, which is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from prefgen.models.mllm_build import train_tokenizer
from prefgen.testing.mllm import CORPUS

LAYERS, WIDTH, INNER, HEADS, KV_HEADS = 2, 64, 96, 4, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are tiny.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = {
    "attn_norm": ("input_layernorm", 0),
    "attn_q": ("self_attn.q_proj", HEADS),
    "attn_k": ("self_attn.k_proj", KV_HEADS),
    "attn_v": ("self_attn.v_proj", 0),
    "attn_output": ("self_attn.o_proj", 0),
    "ffn_norm": ("post_attention_layernorm", 0),
    "ffn_gate": ("mlp.gate_proj", 0),
    "ffn_up": ("mlp.up_proj", 0),
    "ffn_down": ("mlp.down_proj", 0),
}
"""Name in the file -> name in transformers, and heads whose rows llama.cpp writes in another order."""


def tiny_gguf(
    path: Path,
    *,
    seed: int = 0,
    texts: Sequence[str] = (),
    pre: str = "smollm",
    template: str | None = CHATML,
    arch: str = "llama",
    extra_tensor: str | None = None,
) -> tuple[Any, Any]:
    """Write the file: matrices in Q4_1, word embeddings in Q8_0, norms in F32.

    Args:
        path: where to write.
        seed: of the weights.
        texts: more words for the tokenizer.
        pre: name of the pre-tokenizer.
        template: the chat template; None leaves it out.
        arch: name of the architecture.
        extra_tensor: name of a tensor no Llama has.

    Returns:
        The model with the values that the file holds, and the tokenizer, both made without reading it.
    """
    import gguf

    tokenizer = train_tokenizer(
        [*CORPUS, *texts] * 4, vocab_size=512, special_tokens=SPECIAL, named_tokens={}, chat_template=CHATML
    )
    writer = gguf.GGUFWriter(path, arch)
    _describe(writer, tokenizer, pre=pre, template=template)
    model = _random_llama(len(tokenizer), seed=seed)
    states = model.state_dict()
    stored = {"token_embd": ("model.embed_tokens", 0), "output_norm": ("model.norm", 0)}
    for layer in range(LAYERS):
        for part, (name, heads) in PARTS.items():
            stored[f"blk.{layer}.{part}"] = (f"model.layers.{layer}.{name}", heads)
    for theirs, (ours, heads) in stored.items():
        weight = states[f"{ours}.weight"]
        held = _add(writer, f"{theirs}.weight", weight.numpy(), heads=heads)
        weight.copy_(torch.from_numpy(held))
    if extra_tensor is not None:
        writer.add_tensor(extra_tensor, np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval(), tokenizer


def _describe(writer: Any, tokenizer: Any, *, pre: str, template: str | None) -> None:
    import gguf

    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(core["vocab"], key=core["vocab"].__getitem__)
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    if template is not None:
        writer.add_chat_template(template)


def _random_llama(vocab_size: int, *, seed: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.15,  # with the usual 0.02 a tiny model's answers hardly depend on their words
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).requires_grad_(False)


def _add(writer: Any, name: str, weight: NDArray[np.float32], *, heads: int) -> NDArray[np.float32]:
    """Write one tensor; returns the values that the file holds, in transformers' order."""
    import gguf

    rows = np.arange(len(weight))
    if heads:
        rows = rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    if weight.ndim == 1:
        writer.add_tensor(name, weight)
        return weight
    kinds = gguf.GGMLQuantizationType
    kind = kinds.Q8_0 if name.startswith("token_embd") else kinds.Q4_1
    packed = gguf.quantize(np.ascontiguousarray(weight[rows]), kind)
    writer.add_tensor(name, packed, raw_dtype=kind)
    held = np.empty_like(weight)
    held[rows] = gguf.dequantize(packed, kind)
    return held
