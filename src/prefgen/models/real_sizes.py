"""Published sizes of the families, built without weights (on torch's meta device) to be counted and checked.

The configurations and the counts they must add up to are in ``assets/mllm_sizes.json`` with their source.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from prefgen.models.families import FAMILIES, FamilyName
from prefgen.models.lora import LORA_TARGETS, add_lora
from prefgen.models.mllm import MLLM
from prefgen.models.prompts import PromptEncoder

TABLE = Path(__file__).parents[1] / "assets" / "mllm_sizes.json"


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One row of the table.

    Attributes:
        name: on the hub.
        family: whose classes.
        parameters: the published count; None where no exact one was found.
        count_source: where it was found.
        config: the keys of its config.json that decide sizes.
    """

    name: str
    family: FamilyName
    parameters: int | None
    count_source: str
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SizeReport:
    """What a model turned out to be.

    Attributes:
        name: on the hub.
        family: whose classes.
        published: parameters as published, None if unknown.
        parameters: parameters counted, tied ones once.
        num_layers: decoder layers, all of them probed and given LoRA.
        hidden_size: width of their hidden states.
        image_side: pixels along an image's side in prefgen.
        tokens_per_image: its placeholders.
        lora_modules: linear layers that get LoRA.
        lora_path: where they are.
        trainable: parameters of LoRA.
        hidden_shapes: shape of every layer's output for one row of tokens, equal for all.
    """

    name: str
    family: FamilyName
    published: int | None
    parameters: int
    num_layers: int
    hidden_size: int
    image_side: int
    tokens_per_image: int
    lora_modules: int
    lora_path: str
    trainable: int
    hidden_shapes: tuple[tuple[int, ...], ...]


def published_models() -> tuple[PublishedModel, ...]:
    """The table."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["models"]
    return tuple(PublishedModel(**row) for row in rows)


def build_on_meta(published: PublishedModel) -> MLLM:
    """The model without weights, without tokenizer and without image processor."""
    family = FAMILIES[published.family]
    settings = {name: value for name, value in published.config.items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(published.family, **settings)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = family.model_class()(config).eval()
    model.tie_weights()
    side = family.side_of(config)
    encoder = PromptEncoder(tokenizer=None, format=family.prompt_format(config, side=side))
    return MLLM(
        model=model,
        tokenizer=None,
        image_processor=None,
        encoder=encoder,
        family=family,
        image_size=side,
    )


def measure(
    published: PublishedModel, *, rank: int = 8, targets: Sequence[str] = LORA_TARGETS, num_tokens: int = 4
) -> SizeReport:
    """Count a published model and its LoRA, and watch every layer's output for ``num_tokens`` tokens."""
    mllm = build_on_meta(published)
    parameters = sum(p.numel() for p in mllm.model.parameters())
    wrapped = add_lora(mllm, rank=rank, targets=targets)
    trained = {name: p.numel() for name, p in wrapped.named_parameters() if p.requires_grad}
    modules = {name.partition(".lora_")[0] for name in trained}
    example = min(modules)
    layer = next(i for i, part in enumerate(example.split(".")) if part == "layers")
    return SizeReport(
        name=published.name,
        family=published.family,
        published=published.parameters,
        parameters=parameters,
        num_layers=mllm.num_layers,
        hidden_size=mllm.hidden_size,
        image_side=mllm.image_size,
        tokens_per_image=mllm.encoder.format.tokens_per_image,
        lora_modules=len(modules),
        lora_path=".".join(example.split(".")[2 : layer + 1]),
        trainable=sum(trained.values()),
        hidden_shapes=_hidden_shapes(mllm, num_tokens=num_tokens),
    )


@torch.no_grad()
def _hidden_shapes(mllm: MLLM, *, num_tokens: int) -> tuple[tuple[int, ...], ...]:
    shapes: list[tuple[int, ...]] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        shapes.append(tuple(states.shape))

    handles = [layer.register_forward_hook(note) for layer in mllm.text_model.layers]
    embeds = torch.zeros(1, num_tokens, mllm.hidden_size, device="meta")
    mask = torch.zeros(1, 1, num_tokens, num_tokens, device="meta")
    places = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    mllm.text_model(inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False)
    for handle in handles:
        handle.remove()
    return tuple(shapes)
