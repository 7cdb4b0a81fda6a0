"""Which histories the probes see: drawn once, as a pure function of seed and user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prefgen.data.sampling import rng_for
from prefgen.errors import DataError
from prefgen.models.packing import PackItem
from prefgen.models.prompts import Piece
from prefgen.models.questions import UserRows, draw_queries, history_pieces, like_question, list_question
from prefgen.schema import Side

Sides = Literal["both", "liked"]


def shown_disliked(disliked: Sequence[int], *, liked: Sequence[int], sides: Sides) -> tuple[int, ...]:
    """The disliked references shown beside the liked ones; see ``ProbeDataConfig.sides``."""
    return () if sides == "liked" and len(liked) else tuple(disliked)


@dataclass(frozen=True, kw_only=True)
class ProbeSamples:
    """Prompts of one task and what the probe should say about each.

    Attributes:
        items: packed rows; several questions may share one.
        labels: (S,) class of each sample, in the order of items and questions.
        users: (S,) which user a sample belongs to, for intervals.
        num_classes: classes of the task.
        num_places: questions of one sample, next to each other: places at which it is read.
    """

    items: tuple[PackItem, ...]
    labels: Tensor
    users: Tensor
    num_classes: int
    num_places: int = 1


def inter_samples(
    users: Sequence[UserRows],
    *,
    part: str,
    num_draws: int,
    num_references: int,
    seed: int,
    sides: Sides = "both",
    with_target: bool = False,
) -> ProbeSamples:
    """Which user is this? Each draw is read at "What does this user like?".

    Args:
        users: the classes.
        part: "train" draws from one half of each side's images, "test" from the other.
        num_draws: draws a user.
        num_references: references of either side; at most the half.
        seed: of halves and draws.
        sides: which references are shown; the others are drawn all the same.
        with_target: each draw is read at a second place too, at "Does this user like this image?" behind an
            image of the same half that is no reference; a side of two or more keeps one for it.

    Raises:
        DataError: a half has no image left for a target.
    """
    items = [
        _inter_item(
            user,
            part=part,
            draw=draw,
            num_references=num_references,
            seed=seed,
            sides=sides,
            with_target=with_target,
        )
        for user in users
        for draw in range(num_draws)
    ]
    labels = torch.arange(len(users)).repeat_interleave(num_draws)
    return ProbeSamples(
        items=tuple(items),
        labels=labels,
        users=labels,
        num_classes=len(users),
        num_places=2 if with_target else 1,
    )


def intra_samples(
    users: Sequence[UserRows], *, num_references: int, num_queries: int, seed: int, sides: Sides = "both"
) -> ProbeSamples:
    """Liked (1) or disliked (0) target, read at the end of "Does this user like this image?".

    The targets are the same whichever sides are shown.
    """
    items, labels, owners = [], [], []
    for number, user in enumerate(users):
        rng = rng_for(seed=seed, epoch=0, key=user.history.user_id, purpose="probe intra")
        sizes = (len(user.history.liked), len(user.history.disliked))
        liked, disliked = (
            rng.permutation(size)[: min(num_references, max(size - 1, 0))].tolist() for size in sizes
        )
        queries = draw_queries(user.history, liked=liked, disliked=disliked, count=num_queries, rng=rng)
        questions = [
            like_question(user.rows("liked" if is_liked else "disliked", positions=[position])[0])
            for is_liked, position in queries
        ]
        pieces = _pieces(user, liked=liked, disliked=disliked, sides=sides)
        items.append(PackItem(history=pieces, questions=questions))
        labels += [int(is_liked) for is_liked, _ in queries]
        owners += [number] * len(queries)
    return ProbeSamples(
        items=tuple(items), labels=torch.tensor(labels), users=torch.tensor(owners), num_classes=2
    )


def _inter_item(
    user: UserRows,
    *,
    part: str,
    draw: int,
    num_references: int,
    seed: int,
    sides: Sides,
    with_target: bool,
) -> PackItem:
    key = user.history.user_id
    halves = rng_for(seed=seed, epoch=0, key=key, purpose="probe halves")
    rng = rng_for(seed=seed, epoch=draw, key=key, purpose=f"probe inter {part}")
    chosen: list[list[int]] = []
    free: list[int] = []
    sizes: tuple[tuple[Side, int], ...] = (
        ("liked", len(user.history.liked)),
        ("disliked", len(user.history.disliked)),
    )
    for side, size in sizes:
        order = halves.permutation(size)
        half = order[: size // 2] if part == "test" else order[size // 2 :]
        most = min(num_references, max(len(half) - 1, 1)) if with_target else num_references
        drawn = rng.permutation(half).tolist()
        chosen.append(drawn[:most])
        free += user.rows(side, positions=drawn[most : most + 1])
    questions = [list_question("likes")]
    if with_target:
        if not free:
            raise DataError(
                f"user {key}: half of {sizes[0][1]} liked and {sizes[1][1]} disliked images leaves none for "
                "a target; use data.inter_target=false"
            )
        questions.append(like_question(free[int(rng.integers(len(free)))]))
    return PackItem(
        history=_pieces(user, liked=chosen[0], disliked=chosen[1], sides=sides), questions=questions
    )


def _pieces(user: UserRows, *, liked: Sequence[int], disliked: Sequence[int], sides: Sides) -> list[Piece]:
    disliked = shown_disliked(disliked, liked=liked, sides=sides)
    return history_pieces(
        user.rows("liked", positions=liked), disliked=user.rows("disliked", positions=disliked)
    )


def shuffled(labels: Tensor, *, num_cells: int, seed: int) -> Tensor:
    """(S, cells) the labels in an order of its own for each cell, unrelated to the samples: the control."""
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(len(labels)) for _ in range(num_cells)], axis=1)
    return labels[torch.from_numpy(orders)]
