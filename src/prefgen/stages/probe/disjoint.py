"""Histories of one user that share no image, each read with and without a target image, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from prefgen.data.sampling import rng_for
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem
from prefgen.models.probes import LayerChoice
from prefgen.models.questions import UserRows, history_pieces, like_question, list_question
from prefgen.models.representation import embed_items
from prefgen.schema import Side

Place = Literal["question", "target", "targets"]
PLACES: tuple[Place, ...] = get_args(Place)
"""Where core and sem are read: at the open question about likes, without a target image (what profiles do);
at "Does this user like this image?" behind one target; the mean over all targets behind one history."""

Part = Literal["core", "sem"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class DisjointHistory:
    """One of several histories of a user.

    Attributes:
        item: the history; its first question is open, the others ask about a target each.
        num_references: images in the history.
        liked: whether the user likes each target.
    """

    item: PackItem
    num_references: int
    liked: tuple[bool, ...]


def disjoint_histories(
    user: UserRows, *, count: int, num_references: int, num_targets: int, seed: int
) -> tuple[DisjointHistory, ...]:
    """Cut a user's images into ``count`` parts of one size, references first, then targets.

    Args:
        user: whose images.
        count: how many histories.
        num_references: references of either side, fewer where a part would have no target left.
        num_targets: targets of either side, in a random order, so that neither verdict comes first.
        seed: of the cut; with it and the user the result is the same.

    Returns:
        Nothing where the images do not give every part a reference and a target.
    """
    rng = rng_for(seed=seed, epoch=0, key=user.history.user_id, purpose="probe disjoint")
    references: list[dict[Side, list[int]]] = [{} for _ in range(count)]
    targets: list[list[tuple[int, bool]]] = [[] for _ in range(count)]
    sides: tuple[tuple[Side, int], ...] = (
        ("liked", len(user.history.liked)),
        ("disliked", len(user.history.disliked)),
    )
    for side, size in sides:
        order, length = rng.permutation(size), size // count
        asked = min(num_targets, max(length - 1, 0))
        shown = min(num_references, length - asked)
        for number in range(count):
            rows = user.rows(side, positions=order[number * length : (number + 1) * length].tolist())
            references[number][side] = rows[:shown]
            targets[number] += [(row, side == "liked") for row in rows[shown : shown + asked]]
    found = []
    for shown_rows, asked_rows in zip(references, targets, strict=True):
        drawn = [asked_rows[int(i)] for i in rng.permutation(len(asked_rows))]
        pieces = history_pieces(shown_rows["liked"], disliked=shown_rows["disliked"])
        if not pieces or not drawn:
            return ()
        questions = [list_question("likes"), *(like_question(row) for row, _ in drawn)]
        found.append(
            DisjointHistory(
                item=PackItem(history=pieces, questions=questions),
                num_references=sum(len(rows) for rows in shown_rows.values()),
                liked=tuple(liked for _, liked in drawn),
            )
        )
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class UserReadings:
    """What is read of one user.

    Attributes:
        core: (H, 1 + Q, D) of H histories: at the open question, then behind each of Q targets.
        sem: (H, 1 + Q, layers * D).
        liked: (H, Q) whether the user likes each target.
    """

    core: Tensor
    sem: Tensor
    liked: Tensor

    def at(self, place: Place, *, part: Part) -> Tensor:
        """(H, D) of one part."""
        states: Tensor = getattr(self, part)
        if place == "targets":
            return states[:, 1:].mean(1)
        return states[:, PLACES.index(place)]


def read_histories(
    mllm: MLLM,
    *,
    users: Sequence[Sequence[DisjointHistory]],
    image_features: Tensor,
    choice: LayerChoice,
    batch_size: int,
) -> list[UserReadings]:
    """Core and sem of every history of every user, float32 on the CPU.

    Args:
        mllm: the model, with or without LoRA.
        users: for each user H histories with Q targets each.
        image_features: rows that the histories point into.
        choice: where core and sem are.
        batch_size: about so many histories stand in one forward pass; a user's own stand together.
    """
    found: list[UserReadings] = []
    step = max(1, batch_size // max(1, *(len(histories) for histories in users))) if users else 1
    starts = range(0, len(users), step)
    for start in tqdm(starts, desc="reading users", disable=len(starts) < 20):
        some = users[start : start + step]
        items = [one.item for histories in some for one in histories]
        states = embed_items(
            mllm, items=items, image_features=image_features, choice=choice, batch_size=len(items)
        )
        shapes = [(len(histories), len(histories[0].item.questions)) for histories in some]
        sizes = [histories * questions for histories, questions in shapes]
        core, sem = (torch.split(rows.float().cpu(), sizes) for rows in (states.core, states.sem))
        found += [
            UserReadings(
                core=core[i].reshape(*shapes[i], -1),
                sem=sem[i].reshape(*shapes[i], -1),
                liked=torch.tensor([one.liked for one in histories]),
            )
            for i, histories in enumerate(some)
        ]
    return found
