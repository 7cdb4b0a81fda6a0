"""A Llama language model and its tokenizer from one GGUF file (the format of llama.cpp).

Read with the package ``gguf`` one tensor at a time and written as float32: the weights are what the
quantized file holds, no more and no less. The pre-tokenizer is that of SmolLM2's own ``tokenizer.json``
("smollm" in GGUF); files of another are refused, since words would silently fall into other tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefgen.errors import DataError

_CONTROL = 3
"""GGUF's type of a token that is never cut out of words: <|im_start|>, .."""

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Chat templates of text models take a message's content as one string; the processors of multimodal ones pass
# a list of parts. This turns parts into a string; the file's own template follows it unchanged.
_CONTENT_OF_PARTS = (
    "{% set flat = namespace(messages=[]) %}{% for message in messages %}"
    "{% set told = namespace(text='') %}"
    "{% if message['content'] is string %}{% set told.text = message['content'] %}"
    "{% else %}{% for part in message['content'] %}"
    "{% set told.text = told.text + ('IMAGE' if part['type'] == 'image' else part['text']) %}"
    "{% endfor %}{% endif %}"
    "{% set flat.messages = flat.messages + [{'role': message['role'], 'content': told.text}] %}"
    "{% endfor %}{% set messages = flat.messages %}"
)


@dataclass(frozen=True, kw_only=True)
class GGUFText:
    """A text model in memory.

    Attributes:
        model: ``LlamaForCausalLM``, float32, in evaluation mode.
        tokenizer: with the file's control tokens and its chat template.
        name: what the file calls the model.
        licence: as the file states it.
        quantization: number of tensors of each of GGUF's number formats.
    """

    model: Any
    tokenizer: Any
    name: str
    licence: str
    quantization: dict[str, int]


def read_gguf_text(path: Path) -> GGUFText:
    """Read model and tokenizer of a GGUF file.

    Raises:
        DataError: the package ``gguf`` is absent, the file is missing or damaged, or it holds another
            architecture, another pre-tokenizer, no chat template, or more or less than a Llama has.
    """
    reader = _open(path)
    fields = reader.fields

    def value(key: str, *default: Any) -> Any:
        if key in fields:
            return fields[key].contents()
        if not default:
            raise DataError(f"{path} lacks {key}")
        return default[0]

    for key, wanted in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if value(key) != wanted:
            raise DataError(f"{path}: {key} is {value(key)!r}, expected {wanted!r}")
    if value("tokenizer.chat_template", None) is None:
        raise DataError(f"{path} holds no chat template; take a file of an instruction-tuned model")
    model = _model(reader, config=_config(value), where=path)
    return GGUFText(
        model=model,
        tokenizer=_tokenizer(value),
        name=str(value("general.name", path.stem)),
        licence=str(value("general.license", "not stated")),
        quantization=dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
    )


def add_image_tokens(tokenizer: Any, *, named: dict[str, str]) -> Any:
    """The tokenizer with more special tokens, and a chat template that takes images.

    Args:
        tokenizer: of :func:`read_gguf_text`.
        named: name under which a stock processor looks for a token -> token; ``image_token`` among them.

    Returns:
        A new tokenizer; new tokens have the ids behind those of the old one.
    """
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.add_special_tokens([_special(token) for token in dict.fromkeys(named.values())])
    template = _CONTENT_OF_PARTS.replace("IMAGE", named["image_token"]) + tokenizer.chat_template
    known = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        extra_special_tokens=dict(named),
        chat_template=template,
        model_max_length=tokenizer.model_max_length,
        **known,
    )


def _open(path: Path) -> Any:
    if find_spec("gguf") is None:
        raise DataError("GGUF files need the package gguf, which is not installed; run 'make smol'")
    if not path.is_file():
        raise DataError(f"no GGUF file at {path}")
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise DataError(f"{path} is damaged or no GGUF file: {error}") from error


def _config(value: Any) -> LlamaConfig:
    heads = int(value("llama.attention.head_count"))
    return LlamaConfig(
        vocab_size=len(value("tokenizer.ggml.tokens")),
        hidden_size=int(value("llama.embedding_length")),
        intermediate_size=int(value("llama.feed_forward_length")),
        num_hidden_layers=int(value("llama.block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(value("llama.attention.head_count_kv", heads)),
        max_position_embeddings=int(value("llama.context_length")),
        rms_norm_eps=float(value("llama.attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": float(value("llama.rope.freq_base", 10000.0))},
        bos_token_id=value("tokenizer.ggml.bos_token_id", None),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )


def _model(reader: Any, *, config: LlamaConfig, where: Path) -> Any:
    import gguf

    states: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        name = _stock_name(str(tensor.name), where=where)
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".q_proj" in name or ".k_proj" in name:
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            array = _rows_in_stock_order(array, heads=heads)
        states[name] = torch.from_numpy(np.array(array, dtype=np.float32))
    states["lm_head.weight"] = states["model.embed_tokens.weight"]
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    try:
        model.load_state_dict(states)
    except RuntimeError as error:
        raise DataError(f"{where} is no whole Llama: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def _stock_name(name: str, *, where: Path) -> str:
    plain = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in plain:
        return plain[name]
    block, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    stock = _LAYER_NAMES.get(part.removesuffix(".weight"))
    if block != "blk" or not number.isdigit() or stock is None:
        raise DataError(f"{where}: tensor {name} is none of a Llama with tied embeddings")
    return f"model.layers.{number}.{stock}.weight"


def _rows_in_stock_order(array: NDArray[np.float32], *, heads: int) -> NDArray[np.float32]:
    """llama.cpp turns pairs of neighbours, transformers the halves of a head: rows stand in another order."""
    half = array.shape[0] // heads // 2
    return array.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(array.shape)


def _tokenizer(value: Any) -> Any:
    tokens: Sequence[str] = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    kinds: Sequence[int] = value("tokenizer.ggml.token_type")
    core.add_special_tokens(
        [_special(token) for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    )
    places = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    known = {
        f"{ours}_token": value(f"tokenizer.ggml.{theirs}_token_id", None) for ours, theirs in places.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=value("tokenizer.chat_template"),
        model_max_length=int(value("llama.context_length")),
        **{name: tokens[number] for name, number in known.items() if number is not None},
    )


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)
