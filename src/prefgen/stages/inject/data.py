"""A user, a liked picture to be drawn, and what may be known about the user when it is drawn.

Target and e_img come from outside the chosen draw's references; see :mod:`prefgen.data.targets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor

from prefgen.data.buckets import Size
from prefgen.data.encoded import ARRAYS, EncodedImage
from prefgen.data.loader import ResumableLoader
from prefgen.data.reader import decode_image
from prefgen.data.sampling import rng_for
from prefgen.data.targets import choose
from prefgen.models.pixels import to_pixels
from prefgen.schema import Split
from prefgen.stages.inject.config import InjectConfig, InjectLossConfig
from prefgen.stages.inject.users import InjectUsers


class InjectBatch(NamedTuple):
    """B examples.

    Attributes:
        pixels: (B,3,H,W) targets in [-1,1]; None where they come encoded.
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
        moments: (B,2,C,h,w) the targets' posteriors, where they come encoded.
        hidden: (B,T,Dcross) their prompts, dropped ones too, likewise.
        pooled: (B,Dtext) likewise.
    """

    pixels: Tensor | None
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
    moments: Tensor | None = None
    hidden: Tensor | None = None
    pooled: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class InjectExample:
    """One row of an :class:`InjectBatch`.

    The target comes as a file, to be decoded to the size of its bucket, or as the pipeline has encoded it.
    """

    picture: bytes
    encoded: EncodedImage | None
    bucket: int
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


class InjectDataset:
    """One example per user and epoch, a pure function of (seed, epoch, user).

    Attributes:
        num_groups: sizes that targets may have; a batch holds one.
    """

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
        self.num_groups = users.num_buckets

    def __len__(self) -> int:
        return len(self._users)

    def _rng(self, user_id: str, *, epoch: int) -> np.random.Generator:
        return rng_for(seed=self._seed, epoch=epoch, key=user_id, purpose=self._purpose)

    def groups(self, *, epoch: int) -> NDArray[np.int64]:
        """Bucket of each user's target in an epoch: the choice of :meth:`example`, made beforehand."""
        found = [
            self._users.choose(index, rng=self._rng(user_id, epoch=epoch))
            for index, user_id in enumerate(self._users.user_ids)
        ]
        return np.asarray(found, dtype=np.int64)

    def example(self, index: int, *, epoch: int) -> InjectExample:
        """Choose, drop, and seed the noise."""
        user = self._users[index]
        embeddings = user.embeddings
        rng = self._rng(embeddings.user_id, epoch=epoch)
        choice = choose(embeddings, draws=user.draws, rng=rng)
        position = user.position(choice.target)
        keep, keep_text = _draw_drops(self._drops, rng=rng)
        time = float(rng.random()) if self._drops is not None else (index + 0.5) / len(self)
        encoded = self._users.encoded
        item = None if encoded is None else encoded.image(embeddings.user_id, position=position)
        prompt = user.prompts[position] if item is None else item.prompt
        return InjectExample(
            picture=user.pictures[position] if item is None else b"",
            encoded=item,
            bucket=self._users.bucket(index, row=choice.target),
            where=f"{user.where}: liked image {position}",
            prompt=prompt if keep_text else "",
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


def collate(examples: Sequence[InjectExample], *, sizes: Sequence[Size]) -> InjectBatch:
    """Decode the pictures to the size of their bucket and stack; runs in the workers."""
    return InjectBatch(
        **_targets(examples, sizes=sizes),
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


def _targets(examples: Sequence[InjectExample], *, sizes: Sequence[Size]) -> dict[str, Tensor | None]:
    encoded = [example.encoded for example in examples if example.encoded is not None]
    if not encoded:
        images = [decode_image(example.picture, where=example.where) for example in examples]
        return {"pixels": to_pixels(images, size=sizes[examples[0].bucket])}
    stacked = {name: torch.from_numpy(np.stack([getattr(item, name) for item in encoded])) for name in ARRAYS}
    return {"pixels": None, **stacked}


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
            self._splits[split] = InjectUsers(self.config, split=split, buckets=self.sizes())
        return self._splits[split]

    def sizes(self) -> tuple[Size, ...]:
        """Sizes of the targets: the one given, or those of the module."""
        if self._image_size is not None:
            return (self._image_size,)
        assert self.trainer is not None
        sizes: tuple[Size, ...] = self.trainer.lightning_module.buckets
        return sizes

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
        return ResumableLoader(
            dataset,
            batch_size=config.data.batch_size,
            seed=config.seed,
            shuffle=train,
            drop_last=train,
            num_workers=config.loader.num_workers if train else 0,
            stall_seconds=config.loader.stall_seconds,
            collate_fn=partial(collate, sizes=self.sizes()),
            rank=int(trainer.global_rank) if trainer is not None else 0,
            world_size=int(trainer.world_size) if trainer is not None else 1,
            name=f"{split} users",
        )
