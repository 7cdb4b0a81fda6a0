"""A user's taste as vectors (core, sem) and as words, from a few liked and disliked images.

Without a target image the representation is read where the answer to "What does this user like?" would start
(our choice; the paper does not say).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from prefgen.errors import DataError
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, pack_batch
from prefgen.models.pooling import POOLINGS, pooled_states
from prefgen.models.probes import LayerChoice
from prefgen.models.questions import history_pieces, like_question, list_question, parse_attributes


@dataclass(frozen=True, kw_only=True)
class References:
    """Rows of the image features that stand for one user, in prompt order."""

    liked: Sequence[int]
    disliked: Sequence[int]

    def swapped(self) -> References:
        """The negative twin: what was liked is disliked."""
        return References(liked=self.disliked, disliked=self.liked)

    def item(self, *, kind: Literal["likes", "dislikes"] = "likes") -> PackItem:
        """The prompt that is read: history and an open list question."""
        if not len(self.liked) and not len(self.disliked):
            raise DataError("a history needs at least one image on one side")
        pieces = history_pieces(self.liked, disliked=self.disliked)
        return PackItem(history=pieces, questions=[list_question(kind)])


@dataclass(frozen=True, kw_only=True)
class UserStates:
    """core (N, D) and sem (N, layers * D), float32."""

    core: Tensor
    sem: Tensor


@torch.no_grad()
def embed_references(
    mllm: MLLM,
    *,
    references: Sequence[References],
    image_features: Tensor,
    choice: LayerChoice,
    batch_size: int = 32,
) -> UserStates:
    """Core and sem of many histories over cached features (N, K, D); sem is its layers put end to end."""
    items = [one.item() for one in references]
    return embed_items(mllm, items=items, image_features=image_features, choice=choice, batch_size=batch_size)


@torch.no_grad()
def embed_items(
    mllm: MLLM,
    *,
    items: Sequence[PackItem],
    image_features: Tensor,
    choice: LayerChoice,
    batch_size: int = 32,
) -> UserStates:
    """Core and sem at every question of the items, in their order: N is the number of questions."""
    layers = sorted({choice.core_layer, *choice.sem_layers})
    core, sem = [], []
    for start in range(0, len(items), batch_size):
        some = items[start : start + batch_size]
        batch = pack_batch(mllm.encoder, items=some, max_length=mllm.max_length).to(mllm.device)
        pooled = pooled_states(mllm, batch=batch, image_features=image_features, layers=layers)
        core.append(pooled[:, layers.index(choice.core_layer), POOLINGS.index(choice.core_pooling)])
        rows = [layers.index(layer) for layer in choice.sem_layers]
        sem.append(pooled[:, rows, POOLINGS.index(choice.sem_pooling)].flatten(1))
    return UserStates(core=torch.cat(core), sem=torch.cat(sem))


@torch.no_grad()
def embed_history(
    mllm: MLLM, *, liked: Sequence[Image.Image], disliked: Sequence[Image.Image], choice: LayerChoice
) -> UserStates:
    """Core (1, D) and sem (1, layers * D) of one history; either side may be empty, not both."""
    references = _rows(liked=liked, disliked=disliked)
    features = mllm.encode_images([*liked, *disliked])
    return embed_references(mllm, references=[references], image_features=features, choice=choice)


@torch.no_grad()
def list_attributes(
    mllm: MLLM,
    *,
    liked: Sequence[Image.Image],
    disliked: Sequence[Image.Image],
    kind: Literal["likes", "dislikes"],
    max_new_tokens: int = 64,
) -> tuple[str, ...]:
    """What the MLLM says this user likes or dislikes (greedy), as a list of attributes."""
    item = _rows(liked=liked, disliked=disliked).item(kind=kind)
    features = mllm.encode_images([*liked, *disliked])
    return parse_attributes(mllm.generate(item, image_features=features, max_new_tokens=max_new_tokens))


@torch.no_grad()
def like_probability(
    mllm: MLLM,
    *,
    liked: Sequence[Image.Image],
    disliked: Sequence[Image.Image],
    candidates: Sequence[Image.Image],
) -> Tensor:
    """Probability of "Yes" against "No" for each candidate (N,): the MLLM as a scorer of pictures."""
    references = _rows(liked=liked, disliked=disliked)
    features = mllm.encode_images([*liked, *disliked, *candidates])
    first = len(liked) + len(disliked)
    questions = [like_question(first + i) for i in range(len(candidates))]
    item = PackItem(history=references.item().history, questions=questions)
    batch = pack_batch(mllm.encoder, items=[item]).to(mllm.device)
    hidden = mllm.hidden(batch, image_features=features)
    return mllm.choice_logits(batch, hidden=hidden, answers=("Yes", "No")).softmax(-1)[:, 0]


def _rows(*, liked: Sequence[Image.Image], disliked: Sequence[Image.Image]) -> References:
    total = len(liked) + len(disliked)
    return References(liked=range(len(liked)), disliked=range(len(liked), total))
