"""Packed questions by cached keys and values: the history runs once, its cache is handed to every question.

The other way than the additive mask of :mod:`prefgen.models.packing`, for attention code that takes no such
mask (flash attention). Inputs and outputs are the same packed rows, so callers see no difference; a
history's cache is copied for each of its questions, which costs memory that the mask does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from prefgen.models.packing import PackedBatch

RunLayers = Callable[..., Tensor]
"""(rows (n, t) of flat token numbers, attention_mask (n, keys), cache) -> last hidden states (n, t, D)."""


@dataclass(frozen=True)
class PrefixPlan:
    """Which tokens run in the pass over histories and in the pass over questions.

    Attributes:
        history: (B, H) flat numbers of the tokens of each row's history, cut or filled to the longest.
        history_mask: (B, H) which of them are history.
        questions: (Q, L) flat numbers of each question's own tokens, answer included.
        question_mask: (Q, L) which of them are its own.
        items: (Q,) row of each question.
        shape: (B, T) of the packed batch.
    """

    history: Tensor
    history_mask: Tensor
    questions: Tensor
    question_mask: Tensor
    items: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of(batch: PackedBatch) -> PrefixPlan:
        """Read the plan off the segments of a packed batch."""
        segments = batch.segments
        rows, length = segments.shape
        device = segments.device
        in_history = segments == 0
        longest = int(in_history.sum(1).max())
        starts = torch.arange(rows, device=device)[:, None] * length
        own = segments[batch.question_items] == batch.question_segments[:, None]
        counts = own.sum(1)
        widest = int(counts.max()) if len(counts) else 0
        within = torch.arange(widest, device=device)[None]
        columns = (own.int().argmax(1)[:, None] + within).clamp(max=length - 1)
        return PrefixPlan(
            history=starts + torch.arange(longest, device=device)[None],
            history_mask=in_history[:, :longest],
            questions=batch.question_items[:, None] * length + columns,
            question_mask=within < counts[:, None],
            items=batch.question_items,
            shape=(rows, length),
        )

    def put_together(self, history: Tensor, *, questions: Tensor) -> Tensor:
        """(B, H, D) and (Q, L, D) back into packed rows (B, T, D); padding is zero."""
        size = questions.shape[-1] if questions.numel() else history.shape[-1]
        flat = (questions if questions.numel() else history).new_zeros(self.shape[0] * self.shape[1], size)
        for states, numbers, mask in (
            (history, self.history, self.history_mask),
            (questions, self.questions, self.question_mask),
        ):
            if states.numel():
                flat = flat.index_copy(0, numbers[mask], states[mask])
        return flat.view(*self.shape, size)


def run_with_prefix_cache(plan: PrefixPlan, *, run: RunLayers, text_config: Any) -> Tensor:
    """Last hidden states (B, T, D) of a packed batch: histories first, then all questions behind copies.

    Args:
        plan: of the batch.
        run: one pass of the language model over given tokens; see :data:`RunLayers`.
        text_config: the language model's configuration, for its cache.
    """
    cache = DynamicCache(config=text_config)
    # A row that looks at nothing would be NaN in some attention code: an empty history looks at one token
    # that is not its own, and no question ever sees it.
    seen = plan.history_mask.clone()
    if seen.shape[1]:
        seen[:, 0] |= ~seen.any(1)
        history = run(plan.history, attention_mask=seen, cache=cache)
    else:
        history = torch.zeros(plan.shape[0], 0, 0, device=plan.items.device)
    if not plan.questions.numel():
        return plan.put_together(history, questions=history.new_zeros(0, 0, 0))
    if seen.shape[1]:
        cache.batch_select_indices(plan.items)
    keys = torch.cat([plan.history_mask[plan.items], plan.question_mask], dim=1)
    questions = run(plan.questions, attention_mask=keys, cache=cache)
    return plan.put_together(history, questions=questions)
