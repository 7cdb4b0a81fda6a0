"""Users as stage inject knows them: embeddings beside liked pictures, or beside what was encoded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prefgen.config import resolve_path
from prefgen.data.buckets import Size, nearest_bucket
from prefgen.data.embeddings import EmbeddingReader
from prefgen.data.encoded import EncodedReader
from prefgen.data.images import picture_size
from prefgen.data.targets import MIN_OUTSIDE, EncodedTargetReader, TargetReader, TargetUser, choose_rows
from prefgen.errors import DataError
from prefgen.schema import Split
from prefgen.stages.base import shard_root
from prefgen.stages.inject.config import InjectConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What decides the size of a user's target, known without reading the user again.

    Attributes:
        draws: usable draws.
        outside: draw -> rows of pictures outside its references.
        buckets: row -> bucket of its picture.
    """

    draws: tuple[int, ...]
    outside: Mapping[int, tuple[int, ...]]
    buckets: Mapping[int, int]


class InjectUsers:
    """Users of a split that have a draw to learn from.

    Attributes:
        encoded: their pictures and prompts as the pipeline encodes them, or None.
        num_buckets: sizes that targets may have.
        user_ids: by index.
    """

    def __init__(self, config: InjectConfig, *, split: Split, buckets: Sequence[Size] = ()) -> None:
        """Look at every user once.

        Args:
            config: the stage's.
            split: which users.
            buckets: sizes of the targets; none or one cuts all to one size.

        Raises:
            DataError: no user has two liked pictures outside a draw's references.
        """
        data = config.data
        embeddings = shard_root(data.embeddings, loader=config.loader)
        self.encoded = (
            None if data.encoded is None else EncodedReader(resolve_path(data.encoded), split=split)
        )
        self._reader: TargetReader | EncodedTargetReader
        if self.encoded is None:
            shards = shard_root(data.shards, loader=config.loader)
            self._reader = TargetReader(embeddings=embeddings, shards=shards, split=split)
        else:
            self._reader = EncodedTargetReader(embeddings=embeddings, encoded=self.encoded, split=split)
        self.num_buckets = max(1, len(buckets))
        known = self.encoded.buckets() if self.encoded is not None and self.num_buckets > 1 else None
        self._outlines: list[Outline] = []
        limit = data.max_users if split == "train" else data.max_eval_users
        self._rows: list[int] = []
        self.user_ids: list[str] = []
        self._users: list[TargetUser] | None = [] if data.cache == "memory" else None
        num_skipped = 0
        for row in range(len(self._reader)):
            if limit and len(self._rows) == limit:
                break
            user = self._reader[row]
            if not user.draws:
                num_skipped += 1
                continue
            self._rows.append(row)
            self.user_ids.append(user.embeddings.user_id)
            if self.num_buckets > 1:
                self._outlines.append(_outline(user, buckets=buckets, known=known))
            if self._users is not None:
                self._users.append(user)
        if not self._rows:
            raise DataError(
                f"no {split} user in {data.embeddings} has {MIN_OUTSIDE} liked images outside a reference "
                "draw: give users more liked images, or predict embeddings with fewer references"
            )
        if num_skipped:
            log.warning("%d %s users without a usable draw are left out", num_skipped, split)

    def __len__(self) -> int:
        return len(self._rows)

    def choose(self, index: int, *, rng: np.random.Generator) -> int:
        """Bucket of the target that ``choose`` takes with the same ``rng``; the user is not read."""
        outline = self._outlines[index]
        choice = choose_rows(outline.draws, outside=outline.outside.__getitem__, rng=rng)
        return outline.buckets[choice.target]

    def bucket(self, index: int, *, row: int) -> int:
        """Bucket of a picture of a user."""
        return self._outlines[index].buckets[row] if self.num_buckets > 1 else 0

    def __getitem__(self, index: int) -> TargetUser:
        return self._users[index] if self._users is not None else self._reader[self._rows[index]]


def _outline(
    user: TargetUser, *, buckets: Sequence[Size], known: Mapping[str, Sequence[int]] | None
) -> Outline:
    outside = {draw: user.embeddings.rows_outside(draw) for draw in user.draws}
    positions = {row: user.position(row) for rows in outside.values() for row in rows}
    if known is not None:
        own = known[user.embeddings.user_id]
    else:
        own = [
            nearest_bucket(picture_size(data, where=user.where), buckets=buckets) for data in user.pictures
        ]
    return Outline(
        draws=user.draws,
        outside=outside,
        buckets={row: own[position] for row, position in positions.items()},
    )


@dataclass(frozen=True, kw_only=True)
class EmbeddingFacts:
    """What is known of embedding shards before training.

    Attributes:
        sem_width: Dsem.
        core_width: Dcore.
        image_width: Dimage.
        lineage: part -> hash of the models that made them.
    """

    sem_width: int
    core_width: int
    image_width: int
    lineage: dict[str, str]


def read_facts(config: InjectConfig) -> EmbeddingFacts:
    """Look at the first training user.

    Raises:
        DataError: there is no training user.
    """
    reader = EmbeddingReader(shard_root(config.data.embeddings, loader=config.loader), split="train")
    if not len(reader):
        raise DataError(
            f"no training users in {config.data.embeddings}; predict embeddings of that split too"
        )
    first = reader[0]
    assert first is not None
    return EmbeddingFacts(
        sem_width=first.sem.shape[1],
        core_width=first.core.shape[1],
        image_width=first.image.shape[1],
        lineage={name: value for name, value in reader.header.items() if isinstance(value, str)},
    )
