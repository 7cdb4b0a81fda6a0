"""Hidden states of every layer, pooled while the forward pass runs and never kept whole.

The output of each decoder layer is pooled at once, so memory is one layer's hidden states plus the pooled
(questions, layers, poolings, D). Layer l (1 to L) is the output of decoder layer l, before the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackedBatch

Pooling = Literal["last", "image_mean", "mean", "max"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
"""Last token before the answer; mean over the image tokens it sees; mean, and maximum, over all it sees."""


def prompt_mask(batch: PackedBatch) -> Tensor:
    """(Q, T) which tokens of its row belong to a question's prompt: history and question, never an answer."""
    length = batch.segments.shape[1]
    segments = batch.segments[batch.question_items]
    own = segments == batch.question_segments[:, None]
    columns = torch.arange(length, device=segments.device)
    before_answer = columns[None, :] <= (batch.reading_points % length)[:, None]
    return ((segments == 0) | own) & before_answer


def image_mask(batch: PackedBatch) -> Tensor:
    """(B, T) which tokens are images."""
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
    mask[batch.image_slots.reshape(-1)] = True
    return mask.view_as(batch.input_ids)


def pool(hidden: Tensor, *, batch: PackedBatch, poolings: Sequence[Pooling] = POOLINGS) -> Tensor:
    """Pool (B, T, D) for each question: (Q, P, D) float32. A prompt without images has a zero image mean."""
    prompt = prompt_mask(batch)
    images = prompt & image_mask(batch)[batch.question_items]
    states = hidden.float()
    own = states[batch.question_items]
    kinds: dict[Pooling, Callable[[], Tensor]] = {
        "last": lambda: states.reshape(-1, states.shape[-1])[batch.reading_points],
        "image_mean": lambda: _mean(own, mask=images),
        "mean": lambda: _mean(own, mask=prompt),
        "max": lambda: own.masked_fill(~prompt[..., None], float("-inf")).amax(1),
    }
    return torch.stack([kinds[name]() for name in poolings], dim=1)


@torch.no_grad()
def pooled_states(
    mllm: MLLM,
    *,
    batch: PackedBatch,
    image_features: Tensor,
    layers: Sequence[int] | None = None,
    poolings: Sequence[Pooling] = POOLINGS,
) -> Tensor:
    """One forward pass -> (Q, layers, P, D) float32 on the model's device.

    Args:
        mllm: the model, with or without LoRA.
        batch: packed prompts on the model's device.
        image_features: (N, K, D) cached features.
        layers: which layers, 1 to L, in the order wanted; None takes all.
        poolings: which poolings, in the order wanted.
    """
    wanted = list(layers) if layers is not None else list(range(1, mllm.num_layers + 1))
    pooled: dict[int, Tensor] = {}

    def keep(number: int, hidden: Tensor) -> None:
        pooled[number] = pool(hidden, batch=batch, poolings=poolings)

    mllm.hidden(batch, image_features=image_features, layers=wanted, on_layer=keep)
    return torch.stack([pooled[number] for number in wanted], dim=1)


def _mean(states: Tensor, *, mask: Tensor) -> Tensor:
    weights = mask.to(states.dtype)
    return torch.einsum("qtd,qt->qd", states, weights) / weights.sum(1, keepdim=True).clamp(min=1)
