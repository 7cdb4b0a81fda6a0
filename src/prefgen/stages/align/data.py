"""Users' sem embeddings beside a bank of their attribute texts, encoded once before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from prefgen.config import resolve_path
from prefgen.data.embeddings import EmbeddingReader, UserEmbeddings
from prefgen.data.loader import ResumableLoader
from prefgen.data.remote import RemoteFolder
from prefgen.data.sampling import rng_for
from prefgen.errors import DataError
from prefgen.evaluate.alignment import derangement
from prefgen.lineage import hash_folder
from prefgen.models.text import TextSpace
from prefgen.schema import Split
from prefgen.stages.align.config import AlignConfig
from prefgen.stages.base import shard_root

log = logging.getLogger(__name__)

PROBE_USERS = 4096
"""Training users that the attribute probes learn from, at most: more would not make them better readers."""


class AlignBatch(NamedTuple):
    """B users of whole groups.

    Attributes:
        sem: (B,Dsem) one drawn reference draw each.
        own_text: (B,Dtext) the user's attributes in one drawn order.
        mmd_text: (B,Dtext) what stands on the other side of the MMD; equals ``own_text`` for same_users.
        keys: user ids.
    """

    sem: Tensor
    own_text: Tensor
    mmd_text: Tensor
    keys: tuple[str, ...]


class EvaluationBatch(NamedTuple):
    """All measured users at once, with the training users that the attribute probes learn from.

    Attributes:
        sem: (V,Dsem) first reference draw.
        text: (V,Dtext) first order.
        same_text: (V,Dtext) the same attributes in another order.
        labels: (V,A) booleans, user likes attribute.
        train_sem: (N,Dsem).
        train_labels: (N,A).
    """

    sem: Tensor
    text: Tensor
    same_text: Tensor
    labels: Tensor
    train_sem: Tensor
    train_labels: Tensor


@dataclass(frozen=True, kw_only=True)
class AlignExample:
    """One row of an :class:`AlignBatch`."""

    key: str
    sem: Tensor
    own_text: Tensor
    mmd_text: Tensor


class SplitUsers:
    """Users of one split who have both embeddings and liked attributes."""

    def __init__(self, reader: EmbeddingReader, *, keep_in_memory: bool, max_users: int = 0) -> None:
        self._reader = reader
        self._rows: list[int] = []
        self._sem: dict[int, Tensor] | None = {} if keep_in_memory else None
        self.user_ids: list[str] = []
        self.attributes: list[tuple[str, ...]] = []
        for row in range(len(reader)):
            if max_users and len(self._rows) == max_users:
                break
            user = self._read(row)
            if not user.liked_attributes:
                continue
            self._rows.append(row)
            self.user_ids.append(user.user_id)
            self.attributes.append(tuple(user.liked_attributes))
            if self._sem is not None:
                self._sem[row] = torch.from_numpy(user.sem)
        self.num_skipped = len(reader) - len(self._rows) if not max_users else 0

    def __len__(self) -> int:
        return len(self._rows)

    def sem(self, index: int) -> Tensor:
        """(R,Dsem) every reference draw of one user."""
        row = self._rows[index]
        if self._sem is not None:
            return self._sem[row]
        return torch.from_numpy(self._read(row).sem)

    def _read(self, row: int) -> UserEmbeddings:
        user = self._reader[row]
        assert user is not None  # only a reader that skips bad users gives None; ours raises
        return user

    def first_draws(self, count: int | None = None) -> Tensor:
        """(N,Dsem) the first reference draw of the first ``count`` users."""
        count = len(self) if count is None else min(count, len(self))
        return torch.stack([self.sem(index)[0] for index in range(count)])

    def texts(self, space: TextSpace, *, orders: int, seed: int) -> list[str]:
        """``orders`` attribute lists per user, user by user; a pure function of (seed, user, order)."""
        return [
            space.draw_list(words, rng=rng_for(seed=seed, epoch=order, key=user_id, purpose="text_order"))
            for user_id, words in zip(self.user_ids, self.attributes, strict=True)
            for order in range(orders)
        ]


class AlignDataset:
    """Training users; an example is a pure function of (seed, epoch, user)."""

    def __init__(self, users: SplitUsers, *, texts: Tensor, pairing: str, seed: int) -> None:
        """Keep what examples are made from.

        Args:
            users: the training users.
            texts: (U,K,Dtext) the bank.
            pairing: ``AlignLossConfig.pairing``.
            seed: of every draw.
        """
        self._users, self._texts, self._pairing, self._seed = users, texts, pairing, seed
        order = derangement(len(users), seed=seed) if pairing == "permuted" else range(len(users))
        self._text_of = list(order)

    def __len__(self) -> int:
        return len(self._users)

    def example(self, index: int, *, epoch: int) -> AlignExample:
        """Draw references, order of words and, for independent pairing, whose text stands opposite."""
        key = self._users.user_ids[index]
        rng = rng_for(seed=self._seed, epoch=epoch, key=key, purpose="align")
        draws = self._users.sem(index)
        sem = draws[int(rng.integers(len(draws)))]
        own = self._text(self._text_of[index], rng=rng)
        other = self._text(int(rng.integers(len(self))), rng=rng) if self._pairing == "independent" else own
        return AlignExample(key=key, sem=sem, own_text=own, mmd_text=other)

    def _text(self, index: int, *, rng: np.random.Generator) -> Tensor:
        return self._texts[index, int(rng.integers(self._texts.shape[1]))]


def collate(examples: Sequence[AlignExample]) -> AlignBatch:
    """Examples as one batch."""
    return AlignBatch(
        sem=torch.stack([example.sem for example in examples]),
        own_text=torch.stack([example.own_text for example in examples]),
        mmd_text=torch.stack([example.mmd_text for example in examples]),
        keys=tuple(example.key for example in examples),
    )


class AlignData(LightningDataModule):
    """Embedding shards and the text bank, built from a config."""

    def __init__(self, config: AlignConfig) -> None:
        super().__init__()
        self.config = config
        self._splits: dict[Split, SplitUsers] = {}
        self._space: TextSpace | None = None
        self._bank: Tensor | None = None
        self._loader: ResumableLoader[AlignExample, AlignBatch] | None = None
        self.header: dict[str, object] = {}
        self.lineage: dict[str, str] = {}

    # Set-up

    def setup(self, stage: str) -> None:
        """Read the training users and encode their texts; other splits are read when asked for.

        Raises:
            DataError: no training user has liked attributes, or fewer than one batch of them.
        """
        del stage
        if self._bank is not None:
            return
        path = resolve_path(self.config.model.pipeline)
        model = self.config.model
        self._space = TextSpace.load(
            path,
            part=model.text_encoder,
            pooling=model.text_pooling,
            dtype=getattr(torch, model.frozen_dtype),
        )
        reader = EmbeddingReader(self._root, split="train")
        self.header = dict(reader.header)
        self.lineage = {name: value for name, value in self.header.items() if isinstance(value, str)}
        self.lineage["text_encoder"] = hash_folder(path / model.text_encoder)
        self._splits["train"] = self._check(
            SplitUsers(
                reader,
                keep_in_memory=self.config.data.cache == "memory",
                max_users=self.config.data.max_users,
            )
        )
        self._bank = self._encode("train", orders=self.config.data.orders_per_user)

    def _check(self, users: SplitUsers) -> SplitUsers:
        batch = self.config.data.batch_size * max(1, self._world_size())
        if len(users) < batch:
            raise DataError(
                f"{len(users)} training users with liked attributes in {self.config.data.embeddings} cannot "
                f"fill one batch of {batch}; lower data.batch_size (a multiple of align.group_size)"
            )
        if users.num_skipped:
            log.warning("%d training users without liked attributes are left out", users.num_skipped)
        return users

    def _encode(self, split: Split, *, orders: int) -> Tensor:
        """(U,K,Dtext) texts of a split's users."""
        assert self._space is not None
        users = self._splits[split]
        log.info("encoding %d attribute texts of %d users (%s)", orders * len(users), len(users), split)
        rows = self._space.encode(users.texts(self._space, orders=orders, seed=self.config.seed))
        return rows.view(len(users), orders, -1)

    def _users(self, split: Split) -> SplitUsers:
        if split not in self._splits:
            reader = EmbeddingReader(self._root, split=split)
            limit = self.config.evaluation.max_users
            users = SplitUsers(reader, keep_in_memory=True, max_users=limit)
            if len(users) < 2:
                raise DataError(
                    f"split {split!r} in {self.config.data.embeddings} has {len(users)} users with liked "
                    "attributes; measuring needs at least 2"
                )
            self._splits[split] = users
        return self._splits[split]

    @property
    def _root(self) -> Path | RemoteFolder:
        return shard_root(self.config.data.embeddings, loader=self.config.loader)

    def _world_size(self) -> int:
        return int(self.trainer.world_size) if self.trainer is not None else 1

    # What the module starts from

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(N,Dsem) and (N,Dtext) of the training users, from which scales and bandwidth are fixed."""
        assert self._bank is not None
        return self._splits["train"].first_draws(), self._bank[:, 0]

    def evaluation_batch(self, split: Split) -> EvaluationBatch:
        """Everything measured on the users of a split."""
        users, words = self._users(split), self.attribute_names
        texts = self._encode(split, orders=2)
        train_sem, train_labels = self.labelled()
        return EvaluationBatch(
            sem=users.first_draws(),
            text=texts[:, 0],
            same_text=texts[:, 1],
            labels=_labels(users, words=words),
            train_sem=train_sem,
            train_labels=train_labels,
        )

    def labelled(self) -> tuple[Tensor, Tensor]:
        """First draws (N,Dsem) of training users, at most ``PROBE_USERS``, and which attributes they like."""
        train = self._splits["train"]
        labels = _labels(train, words=self.attribute_names)
        return train.first_draws(PROBE_USERS), labels[:PROBE_USERS]

    def held_out(self) -> tuple[Tensor, Tensor] | None:
        """The same of validation users; None where the embeddings hold none."""
        try:
            users = self._users("validation")
        except DataError as error:
            log.info("no held-out users for the attribute readout (%s)", error)
            return None
        return users.first_draws(), _labels(users, words=self.attribute_names)

    @property
    def attribute_names(self) -> list[str]:
        """The columns of ``labels``."""
        return sorted({word for attributes in self._splits["train"].attributes for word in attributes})

    # Loaders

    def train_dataloader(self) -> ResumableLoader[AlignExample, AlignBatch]:
        """Whole groups of training users, in an order that is a pure function of (seed, epoch, rank)."""
        assert self._bank is not None
        dataset = AlignDataset(
            self._splits["train"], texts=self._bank, pairing=self.config.align.pairing, seed=self.config.seed
        )
        self._loader = ResumableLoader(
            dataset,
            batch_size=self.config.data.batch_size,
            seed=self.config.seed,
            shuffle=True,
            drop_last=True,
            num_workers=self.config.loader.num_workers,
            stall_seconds=self.config.loader.stall_seconds,
            collate_fn=collate,
            rank=int(self.trainer.global_rank) if self.trainer is not None else 0,
            world_size=max(1, self._world_size()),
        )
        return self._loader

    def val_dataloader(self) -> DataLoader[EvaluationBatch]:
        """One batch with all validation users."""
        return _single(self.evaluation_batch("validation"))

    def test_dataloader(self) -> DataLoader[EvaluationBatch]:
        """One batch with all test users."""
        return _single(self.evaluation_batch("test"))


def _single(batch: EvaluationBatch) -> DataLoader[EvaluationBatch]:
    # A list of one batch is a map-style dataset; batch_size=None hands it through as it is.
    return DataLoader([batch], batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]


def _as_it_is(batch: EvaluationBatch) -> EvaluationBatch:
    return batch


def _labels(users: SplitUsers, *, words: Sequence[str]) -> Tensor:
    sets = [frozenset(attributes) for attributes in users.attributes]
    return torch.tensor([[word in liked for word in words] for liked in sets], dtype=torch.bool)
