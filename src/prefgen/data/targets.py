"""Which picture of a user is drawn, and which others may describe the user meanwhile.

The rule that keeps the target out of its own description: with a reference draw chosen, target and e_img are
two different liked pictures that are not among the draw's references. Otherwise a model would learn to copy a
picture it was shown instead of a taste.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefgen.data.embeddings import EmbeddingReader, UserEmbeddings
from prefgen.data.encoded import EncodedReader
from prefgen.data.reader import ShardReader
from prefgen.data.remote import RemoteFolder
from prefgen.errors import DataError
from prefgen.schema import Split, image_key

MIN_OUTSIDE = 2
"""Liked pictures outside a draw's references that an example takes: the target and e_img."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One draw, and two liked pictures outside its references, as rows of ``UserEmbeddings.image``."""

    draw: int
    target: int
    anchor: int


def usable_draws(embeddings: UserEmbeddings) -> tuple[int, ...]:
    """Draws with at least two liked pictures outside their references."""
    draws = range(len(embeddings.reference_keys))
    return tuple(draw for draw in draws if len(embeddings.rows_outside(draw)) >= MIN_OUTSIDE)


def choose(embeddings: UserEmbeddings, *, draws: Sequence[int], rng: np.random.Generator) -> Choice:
    """Choose a draw, a target and e_img.

    Args:
        embeddings: the user.
        draws: :func:`usable_draws` of the user, not empty.
        rng: see ``rng_for``.
    """
    return choose_rows(draws, outside=embeddings.rows_outside, rng=rng)


def choose_rows(
    draws: Sequence[int], *, outside: Callable[[int], Sequence[int]], rng: np.random.Generator
) -> Choice:
    """:func:`choose` where only the rows outside each draw's references are at hand."""
    draw = int(draws[int(rng.integers(len(draws)))])
    target, anchor = rng.permutation(outside(draw))[:MIN_OUTSIDE]
    return Choice(draw=draw, target=int(target), anchor=int(anchor))


@dataclass(frozen=True, kw_only=True)
class TargetUser:
    """Embeddings of a user beside its liked pictures.

    Attributes:
        embeddings: the user's numbers.
        draws: :func:`usable_draws`; may be empty.
        num_liked: liked pictures.
        pictures: as files, in the order of the history; empty where an encoded set stands for them.
        prompts: their prompts; likewise.
        where: shard and key, for messages.
    """

    embeddings: UserEmbeddings
    draws: tuple[int, ...]
    num_liked: int
    pictures: tuple[bytes, ...]
    prompts: tuple[str, ...]
    where: str

    def position(self, row: int) -> int:
        """Place among the liked pictures of a row of ``embeddings.image``.

        Raises:
            DataError: the shards do not hold that picture.
        """
        key = self.embeddings.image_keys[row]
        own = [image_key(self.embeddings.user_id, "liked", i) for i in range(self.num_liked)]
        if key not in own:
            raise DataError(
                f"{self.where} has no picture {key}: the embeddings were made from other histories than "
                "these shards; run 'prefgen predict --stage probe' again"
            )
        return own.index(key)


class TargetReader:
    """Users of one split by the order of the embedding shards, each beside its pictures."""

    def __init__(self, *, embeddings: Path | RemoteFolder, shards: Path | RemoteFolder, split: Split) -> None:
        """Open both folders.

        Raises:
            DataError: one of them is missing or broken, or has no such split.
        """
        self.embeddings = EmbeddingReader(embeddings, split=split)
        self.shards = ShardReader(shards, split=split)
        self._positions = {user_id: i for i, user_id in enumerate(self.shards.user_ids)}

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, row: int) -> TargetUser:
        """The user at a position.

        Raises:
            DataError: a broken sample, or a user without pictures.
        """
        embeddings = self.embeddings[row]
        assert embeddings is not None  # only a reader that skips bad users gives None; ours raises
        if embeddings.user_id not in self._positions:
            raise DataError(
                f"user {embeddings.user_id} of {self.embeddings.root} is not in {self.shards.root}; run "
                "'prefgen predict --stage probe' again on these shards"
            )
        sample = self.shards[self._positions[embeddings.user_id]]
        assert sample is not None
        return TargetUser(
            embeddings=embeddings,
            draws=usable_draws(embeddings),
            num_liked=len(sample.liked),
            pictures=sample.liked,
            prompts=tuple(image.prompt for image in sample.history.liked),
            where=sample.where,
        )


class EncodedTargetReader:
    """As :class:`TargetReader`, beside an encoded set: no picture is read or decoded."""

    def __init__(self, *, embeddings: Path | RemoteFolder, encoded: EncodedReader, split: Split) -> None:
        """Open the embeddings.

        Raises:
            DataError: they are missing or broken, or have no such split.
        """
        self.embeddings = EmbeddingReader(embeddings, split=split)
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, row: int) -> TargetUser:
        """The user at a position.

        Raises:
            DataError: a broken sample, or a user that was not encoded.
        """
        embeddings = self.embeddings[row]
        assert embeddings is not None
        count = self.encoded.num_images(embeddings.user_id)
        if not count:
            raise DataError(
                f"user {embeddings.user_id} of {self.embeddings.root} is not in {self.encoded.root}; run "
                "'prefgen data encode' again on the histories of these embeddings"
            )
        return TargetUser(
            embeddings=embeddings,
            draws=usable_draws(embeddings),
            num_liked=count,
            pictures=(),
            prompts=(),
            where=f"{self.encoded.root}: user {embeddings.user_id}",
        )
