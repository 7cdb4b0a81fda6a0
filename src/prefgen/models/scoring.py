"""How often an MLLM is right about what unseen users like, counted per user."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefgen.errors import DataError
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, pack_batch
from prefgen.models.questions import YES_NO, UserRows, draw_queries, history_pieces, like_question
from prefgen.schema import UserHistory


@dataclass(frozen=True, kw_only=True)
class LikeScores:
    """Answers to like-or-dislike questions, one row a question.

    Attributes:
        probability: (N,) of "Yes" against "No".
        liked: (N,) the truth.
        user: (N,) index of the user asked about.
        num_users: how many users were asked about.
    """

    probability: NDArray[np.float64]
    liked: NDArray[np.bool_]
    user: NDArray[np.int64]
    num_users: int

    @property
    def correct(self) -> NDArray[np.float64]:
        """(N,) 1 where the likelier answer is right, one half for a tie."""
        tie = self.probability == 0.5
        return np.where(tie, 0.5, (self.probability > 0.5) == self.liked)

    def per_user(self) -> NDArray[np.float64]:
        """(num_users,) share of right answers: the sample over which intervals are drawn."""
        right = np.bincount(self.user, weights=self.correct, minlength=self.num_users)
        asked = np.bincount(self.user, minlength=self.num_users)
        return right[asked > 0] / asked[asked > 0]


@torch.no_grad()
def like_accuracy(
    mllm: MLLM,
    *,
    users: Sequence[UserRows],
    image_features: Tensor,
    num_references: tuple[int, int] = (8, 8),
    num_queries: int = 16,
    swap_histories: bool = False,
    seed: int = 0,
    batch_size: int = 16,
) -> LikeScores:
    """Ask about images outside the references of each user; a pure function of seed and user.

    Args:
        mllm: with its LoRA, if any.
        users: whom to ask about.
        image_features: (N, K, D) rows that ``users`` point into.
        num_references: liked and disliked references (fewer where a side would have no query left).
        num_queries: questions a user.
        swap_histories: show each user's questions behind the NEXT user's history (the history-blind control).
        seed: of the draws.
        batch_size: users a forward pass.

    Raises:
        DataError: swapping with fewer than two users.
    """
    if swap_histories and len(users) < 2:
        raise DataError(f"swapping histories needs at least 2 users, got {len(users)}")
    drawn = [_draw(user, num_references=num_references, num_queries=num_queries, seed=seed) for user in users]
    probability: list[Tensor] = []
    for start in range(0, len(users), batch_size):
        numbers = range(start, min(start + batch_size, len(users)))
        items = []
        for i in numbers:
            history = drawn[(i + 1) % len(users) if swap_histories else i][0]
            items.append(PackItem(history=history, questions=[like_question(row) for row, _ in drawn[i][1]]))
        batch = pack_batch(mllm.encoder, items=items).to(mllm.device)
        hidden = mllm.hidden(batch, image_features=image_features)
        probability.append(mllm.choice_logits(batch, hidden=hidden, answers=YES_NO).softmax(-1)[:, 0].cpu())
    return LikeScores(
        probability=torch.cat(probability).double().numpy(),
        liked=np.array([liked for _, asked in drawn for _, liked in asked], dtype=np.bool_),
        user=np.array([i for i, (_, asked) in enumerate(drawn) for _ in asked], dtype=np.int64),
        num_users=len(users),
    )


@dataclass(frozen=True, kw_only=True)
class LikeDraw:
    """What one user is asked: positions within the two sides of the history.

    Attributes:
        liked: liked references, in prompt order.
        disliked: disliked references, in prompt order.
        disliked_first: which side the prompt begins with.
        queries: (is it liked, position) of each image asked about; none is a reference.
    """

    liked: tuple[int, ...]
    disliked: tuple[int, ...]
    disliked_first: bool
    queries: tuple[tuple[bool, int], ...]


def draw_like(
    history: UserHistory, *, num_references: tuple[int, int], num_queries: int, seed: int
) -> LikeDraw:
    """The references and queries of :func:`like_accuracy`: a pure function of seed and user."""
    rng = np.random.default_rng([seed, zlib.crc32(history.user_id.encode())])
    liked, disliked = (
        rng.permutation(size)[: min(count, max(size - 1, 0))].tolist()
        for size, count in zip((len(history.liked), len(history.disliked)), num_references, strict=True)
    )
    disliked_first = bool(rng.integers(2))
    queries = draw_queries(history, liked=liked, disliked=disliked, count=num_queries, rng=rng)
    return LikeDraw(
        liked=tuple(liked), disliked=tuple(disliked), disliked_first=disliked_first, queries=tuple(queries)
    )


def _draw(
    user: UserRows, *, num_references: tuple[int, int], num_queries: int, seed: int
) -> tuple[list[str | int], list[tuple[int, bool]]]:
    drawn = draw_like(user.history, num_references=num_references, num_queries=num_queries, seed=seed)
    pieces = history_pieces(
        user.rows("liked", positions=drawn.liked),
        disliked=user.rows("disliked", positions=drawn.disliked),
        disliked_first=drawn.disliked_first,
    )
    asked = [
        (user.rows("liked" if is_liked else "disliked", positions=[position])[0], is_liked)
        for is_liked, position in drawn.queries
    ]
    return pieces, asked
