"""A user, a liked picture to be drawn, and what may be known about the user when it is drawn.

Target and e_img come from outside the chosen draw's references; see :mod:`prefgen.data.targets`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from prefgen.data.embeddings import EmbeddingReader
from prefgen.data.loader import ResumableLoader
from prefgen.data.reader import decode_image
from prefgen.data.sampling import rng_for
from prefgen.data.targets import MIN_OUTSIDE, TargetReader, TargetUser, choose
from prefgen.errors import DataError
from prefgen.models.pixels import to_pixels
from prefgen.schema import Split
from prefgen.stages.base import shard_root
from prefgen.stages.inject.config import InjectConfig, InjectLossConfig

log = logging.getLogger(__name__)


class InjectBatch(NamedTuple):
    """B examples.

    Attributes:
        pixels: (B,3,H,W) targets in [-1,1].
        prompts: B subjects, "" where the text is dropped.
        sem: (B,Dsem) of the chosen draws; the module makes ``aligned`` of them.
        core: (B,Dcore).
        image: (B,Dimage) e_img.
        keep: (B,3) bool, False where aligned, core or image is dropped.
        times: (B,) float64 in [0,1), the place of each example's timestep.
        noise_seeds: B seeds of the noise.
        keys: image keys of the targets.
        anchor_keys: image keys of e_img.
        references: image keys of the chosen draws.
    """

    pixels: Tensor
    prompts: tuple[str, ...]
    sem: Tensor
    core: Tensor
    image: Tensor
    keep: Tensor
    times: Tensor
    noise_seeds: tuple[int, ...]
    keys: tuple[str, ...]
    anchor_keys: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class InjectExample:
    """One row of an :class:`InjectBatch`; ``picture`` is still encoded."""

    picture: bytes
    where: str
    prompt: str
    sem: Tensor
    core: Tensor
    image: Tensor
    keep: Tensor
    time: float
    noise_seed: int
    key: str
    anchor_key: str
    references: tuple[str, ...]


class InjectUsers:
    """Users of a split that have a draw to learn from."""

    def __init__(self, config: InjectConfig, *, split: Split) -> None:
        """Look at every user once.

        Raises:
            DataError: no user has two liked pictures outside a draw's references.
        """
        data = config.data
        self._reader = TargetReader(
            embeddings=shard_root(data.embeddings, loader=config.loader),
            shards=shard_root(data.shards, loader=config.loader),
            split=split,
        )
        limit = data.max_users if split == "train" else data.max_eval_users
        self._rows: list[int] = []
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

    def __getitem__(self, index: int) -> TargetUser:
        return self._users[index] if self._users is not None else self._reader[self._rows[index]]


class InjectDataset:
    """One example per user and epoch, a pure function of (seed, epoch, user)."""

    def __init__(
        self, users: InjectUsers, *, seed: int, drops: InjectLossConfig | None, purpose: str
    ) -> None:
        """Keep what examples are made from.

        Args:
            users: of one split.
            seed: of every draw.
            drops: rates of dropping; None drops nothing and spreads the timesteps evenly over the users, so
                that few users measure all noise levels.
            purpose: names the stream of draws.
        """
        self._users, self._seed, self._drops, self._purpose = users, seed, drops, purpose

    def __len__(self) -> int:
        return len(self._users)

    def example(self, index: int, *, epoch: int) -> InjectExample:
        """Choose, drop, and seed the noise."""
        user = self._users[index]
        embeddings = user.embeddings
        rng = rng_for(seed=self._seed, epoch=epoch, key=embeddings.user_id, purpose=self._purpose)
        choice = choose(embeddings, draws=user.draws, rng=rng)
        position = user.position(choice.target)
        keep, keep_text = _draw_drops(self._drops, rng=rng)
        time = float(rng.random()) if self._drops is not None else (index + 0.5) / len(self)
        return InjectExample(
            picture=user.pictures[position],
            where=f"{user.where}: liked image {position}",
            prompt=user.prompts[position] if keep_text else "",
            sem=torch.from_numpy(embeddings.sem[choice.draw]),
            core=torch.from_numpy(embeddings.core[choice.draw]),
            image=torch.from_numpy(embeddings.image[choice.anchor]),
            keep=keep,
            time=time,
            noise_seed=int(rng.integers(1 << 62)),
            key=embeddings.image_keys[choice.target],
            anchor_key=embeddings.image_keys[choice.anchor],
            references=embeddings.reference_keys[choice.draw],
        )


def _draw_drops(drops: InjectLossConfig | None, *, rng: np.random.Generator) -> tuple[Tensor, bool]:
    """((3,) bool: keep aligned, core, image; keep the text)."""
    # Drawn whatever the rates are, so that a rate of 0 leaves every other draw as it was.
    one, parts = rng.random(), rng.random(3)
    if drops is None:
        return torch.ones(3, dtype=torch.bool), True
    both = drops.both_drop_rate
    drop_user = one < both + drops.user_drop_rate
    drop_text = one < both or both + drops.user_drop_rate <= one < both + (
        drops.user_drop_rate + drops.text_drop_rate
    )
    keep = torch.from_numpy(parts >= drops.part_drop_rate) & (not drop_user)
    return keep, not drop_text


def collate(examples: Sequence[InjectExample], *, image_size: tuple[int, int]) -> InjectBatch:
    """Decode the pictures and stack; runs in the workers."""
    images = [decode_image(example.picture, where=example.where) for example in examples]
    return InjectBatch(
        pixels=to_pixels(images, size=image_size),
        prompts=tuple(example.prompt for example in examples),
        sem=torch.stack([example.sem for example in examples]),
        core=torch.stack([example.core for example in examples]),
        image=torch.stack([example.image for example in examples]),
        keep=torch.stack([example.keep for example in examples]),
        times=torch.tensor([example.time for example in examples], dtype=torch.float64),
        noise_seeds=tuple(example.noise_seed for example in examples),
        keys=tuple(example.key for example in examples),
        anchor_keys=tuple(example.anchor_key for example in examples),
        references=tuple(example.references for example in examples),
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


class InjectData(LightningDataModule):
    """Pictures and embeddings of all splits, built from a config."""

    def __init__(self, config: InjectConfig, *, image_size: tuple[int, int] | None = None) -> None:
        """Remember the configuration.

        Args:
            config: the stage's.
            image_size: (H,W) of the targets; None asks the module's pipeline.
        """
        super().__init__()
        self.config = config
        self._image_size = image_size
        self._splits: dict[Split, InjectUsers] = {}

    def users(self, split: Split) -> InjectUsers:
        """Users of a split, read when first asked for."""
        if split not in self._splits:
            self._splits[split] = InjectUsers(self.config, split=split)
        return self._splits[split]

    def statistics(self, *, max_rows: int = 4096) -> dict[str, Tensor]:
        """Rows (N,D) of ``sem``, ``core`` and ``image`` of training users, for fixed standardisation."""
        users = self.users("train")
        rows: dict[str, list[Tensor]] = {"sem": [], "core": [], "image": []}
        step = max(1, len(users) * 4 // max_rows)
        for index in range(0, len(users), step):
            embeddings = users[index].embeddings
            # Liked pictures only: e_img is always one.
            liked = [row for row, key in enumerate(embeddings.image_keys) if "/liked." in key][:4]
            rows["sem"].append(torch.from_numpy(embeddings.sem[:4]))
            rows["core"].append(torch.from_numpy(embeddings.core[:4]))
            rows["image"].append(torch.from_numpy(embeddings.image[liked]))
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def train_dataloader(self) -> ResumableLoader[InjectExample, InjectBatch]:
        """One example a user and epoch, in an order that is a pure function of (seed, epoch, rank)."""
        return self._loader("train", train=True)

    def val_dataloader(self) -> ResumableLoader[InjectExample, InjectBatch]:
        """The same examples, noise and timesteps at every validation."""
        return self._loader("validation", train=False)

    def test_dataloader(self) -> ResumableLoader[InjectExample, InjectBatch]:
        """The same for test users."""
        return self._loader("test", train=False)

    def _loader(self, split: Split, *, train: bool) -> ResumableLoader[InjectExample, InjectBatch]:
        config, trainer = self.config, self.trainer
        dataset = InjectDataset(
            self.users(split),
            seed=config.seed,
            drops=config.inject if train else None,
            purpose=f"inject {split}",
        )
        size = self._image_size
        if size is None:
            assert trainer is not None
            size = trainer.lightning_module.bundle.image_size
        return ResumableLoader(
            dataset,
            batch_size=config.data.batch_size,
            seed=config.seed,
            shuffle=train,
            drop_last=train,
            num_workers=config.loader.num_workers if train else 0,
            stall_seconds=config.loader.stall_seconds,
            collate_fn=partial(collate, image_size=size),
            rank=int(trainer.global_rank) if trainer is not None else 0,
            world_size=int(trainer.world_size) if trainer is not None else 1,
            name=f"{split} users",
        )
