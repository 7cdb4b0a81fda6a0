"""Draws made at load time: pure functions of (seed, epoch, key, purpose), never baked into shards."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from prefgen.errors import DataError
from prefgen.schema import Side, UserHistory, image_key


@dataclass(frozen=True, kw_only=True)
class References:
    """Positions of the images drawn as a user's evidence, in drawn (random) order."""

    liked: tuple[int, ...]
    disliked: tuple[int, ...]

    def keys(self, user_id: str) -> tuple[str, ...]:
        """Image keys of the draw, liked ones first."""
        return tuple(image_key(user_id, "liked", i) for i in self.liked) + tuple(
            image_key(user_id, "disliked", i) for i in self.disliked
        )

    def swapped(self) -> References:
        """The same images with the sides exchanged: the negative twin."""
        return References(liked=self.disliked, disliked=self.liked)


def rng_for(*, seed: int, epoch: int, key: str, purpose: str) -> np.random.Generator:
    """A generator that depends on its four arguments only, the same on every machine and worker.

    Args:
        seed: of the run.
        epoch: pass over the data, from 0.
        key: the user or sample drawn for.
        purpose: what is drawn ("references", "query", ...): each purpose has a stream of its own, so that one
            more draw for one purpose leaves the others as they were.
    """
    # The lengths stand before the words: without them ("ab", "c") and ("a", "bc") would share a stream.
    text = f"{seed}|{epoch}|{len(key)}:{key}|{len(purpose)}:{purpose}"
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def draw_references(
    history: UserHistory,
    *,
    num_liked: int | tuple[int, int],
    num_disliked: int | tuple[int, int],
    rng: np.random.Generator,
    exclude: Collection[str] = frozenset(),
) -> References:
    """Draw the images that speak for a user.

    Args:
        history: the user.
        num_liked: how many liked images, or the inclusive range (low, high) to draw the number from.
        num_disliked: the same for the disliked side, drawn independently: the counts may differ.
        rng: see :func:`rng_for`.
        exclude: image keys (``schema.image_key``) that must not be drawn, such as the target's.

    Returns:
        Distinct positions; fewer than asked where the side holds fewer.

    Raises:
        DataError: a count is negative or a range reversed, or not a single image is left to draw.
    """
    liked = _draw_side(history, side="liked", count=num_liked, rng=rng, exclude=exclude)
    disliked = _draw_side(history, side="disliked", count=num_disliked, rng=rng, exclude=exclude)
    if not liked and not disliked:
        raise DataError(
            f"user {history.user_id}: no reference can be drawn from {len(history.liked)} liked and "
            f"{len(history.disliked)} disliked images with {len(exclude)} excluded; "
            "ask for at least one reference and give every user at least one image beside the target"
        )
    return References(liked=liked, disliked=disliked)


def _draw_side(
    history: UserHistory,
    *,
    side: Side,
    count: int | tuple[int, int],
    rng: np.random.Generator,
    exclude: Collection[str],
) -> tuple[int, ...]:
    low, high = (count, count) if isinstance(count, int) else count
    if low < 0 or high < low:
        raise DataError(f"num_{side}: expected a count >= 0 or a range (low, high), got {count!r}")
    number = int(rng.integers(low, high + 1))
    free = [i for i in range(len(history.side(side))) if image_key(history.user_id, side, i) not in exclude]
    order = rng.permutation(len(free))[:number]
    return tuple(free[i] for i in order)
