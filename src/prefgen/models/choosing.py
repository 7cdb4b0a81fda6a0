"""Which of two images a user would choose, in the words of stage 1's question, in both orders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefgen.errors import DataError
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, pack_batch, row_length
from prefgen.models.prompts import Piece
from prefgen.models.questions import FIRST_SECOND, choose_question

PAIRS_PER_PASS = 4
"""Pairs asked about in one row, twice each: long enough to share the history, short enough for its mask."""


@torch.no_grad()
def choice_margins(
    mllm: MLLM,
    *,
    history: Sequence[Piece],
    pairs: Sequence[tuple[int, int]],
    image_features: Tensor,
    pairs_per_pass: int = PAIRS_PER_PASS,
) -> Tensor:
    """Logit of "first" minus logit of "second" behind a user's history.

    The answer is read from these two words alone, whatever else the model would rather say.

    Args:
        mllm: who is asked.
        history: what stands before the question; see :func:`prefgen.models.questions.history_pieces`.
        pairs: N pairs of rows of the features.
        image_features: (R, K, F).
        pairs_per_pass: pairs in one row.

    Returns:
        (N, 2) float32 on the CPU: the pair as given, and with its two images exchanged.

    Raises:
        DataError: history and question are longer than the model was built for.
    """
    found = [torch.empty(0, 2)]
    for start in range(0, len(pairs), pairs_per_pass):
        questions = [
            choose_question(one, second=other)
            for pair in pairs[start : start + pairs_per_pass]
            for one, other in (pair, pair[::-1])
        ]
        # Each question stands right behind the history, wherever it lies in the row.
        longest = row_length(mllm.encoder, item=PackItem(history=history, questions=questions[:1]))
        if longest > mllm.max_length:
            raise DataError(
                f"a history and two images are {longest} tokens, the multimodal LLM was built for "
                f"{mllm.max_length}: show fewer references"
            )
        items = [PackItem(history=history, questions=questions)]
        batch = pack_batch(mllm.encoder, items=items).to(mllm.device)
        hidden = mllm.hidden(batch, image_features=image_features)
        logits = mllm.choice_logits(batch, hidden=hidden, answers=FIRST_SECOND).cpu()
        found.append((logits[:, 0] - logits[:, 1]).view(-1, 2))
    return torch.cat(found)
