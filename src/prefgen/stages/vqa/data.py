"""Histories and questions for stage vqa, drawn at load time as a pure function of (seed, epoch, user)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor

from prefgen.data.budget import TokenBudget
from prefgen.data.loader import ResumableLoader
from prefgen.data.reader import ShardReader
from prefgen.data.sampling import References, draw_references, rng_for
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackedBatch, pack_batch, row_length
from prefgen.models.prompts import PromptEncoder
from prefgen.models.questions import AskedItem, QuestionCounts, QuestionKind, UserRows, draw_item
from prefgen.schema import Split
from prefgen.stages.base import rank_zero_first, shard_root
from prefgen.stages.features import SplitFeatures, load_features, model_hash, read_users, user_images
from prefgen.stages.vqa.config import VQAConfig


@dataclass(frozen=True, kw_only=True)
class VQABatch:
    """Packed questions of B users.

    Attributes:
        packed: the rows; its image rows point into the split's features, or into ``pixels`` if given.
        kinds: kind of each of the Q questions.
        correct: (Q,) index of the right first word, -1 for lists.
        user_ids: whose rows these are.
        pixels: (images, 3, H, W) of the images of this batch where features are not cached.
    """

    packed: PackedBatch
    kinds: tuple[QuestionKind, ...]
    correct: Tensor
    user_ids: tuple[str, ...]
    pixels: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VQABatch:
        """Tensors on another device (the signature Lightning calls)."""
        return replace(
            self,
            packed=self.packed.to(device, non_blocking=non_blocking),
            correct=self.correct.to(device, non_blocking=non_blocking),
            pixels=None if self.pixels is None else self.pixels.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, kw_only=True)
class DrawRules:
    """How references and questions are drawn; plain values, for worker processes."""

    purpose: Literal["train", "eval"]
    num_liked: tuple[int, int]
    num_disliked: tuple[int, int]
    empty_side_rate: float
    counts: QuestionCounts


class VQADataset:
    """``example(index, epoch=)`` -> one user with references and questions."""

    def __init__(self, users: Sequence[UserRows], *, rules: DrawRules, seed: int) -> None:
        self.users = users
        self._rules = rules
        self._seed = seed

    def __len__(self) -> int:
        return len(self.users)

    def example(self, index: int, *, epoch: int) -> tuple[str, AskedItem]:
        """User id and what is asked about the user."""
        user, rules = self.users[index], self._rules
        key = user.history.user_id
        references = self.references(index, epoch=epoch)
        rng = rng_for(seed=self._seed, epoch=epoch, key=key, purpose=f"{rules.purpose} questions")
        asked = draw_item(
            user,
            liked=references.liked,
            disliked=references.disliked,
            counts=rules.counts,
            rng=rng,
        )
        return key, asked

    def length(self, index: int, epoch: int, *, encoder: PromptEncoder) -> int:
        """Tokens of the packed row of an example."""
        return row_length(encoder, item=self.example(index, epoch=epoch)[1].item)

    def references(self, index: int, *, epoch: int) -> References:
        """The draw that speaks for the user; a side of two or more images keeps one for a query."""
        history, rules = self.users[index].history, self._rules
        rng = rng_for(
            seed=self._seed, epoch=epoch, key=history.user_id, purpose=f"{rules.purpose} references"
        )
        liked = _within(rules.num_liked, available=len(history.liked))
        disliked = _within(rules.num_disliked, available=len(history.disliked))
        if liked[0] and disliked[0] and rng.random() < rules.empty_side_rate:
            liked, disliked = ((0, 0), disliked) if rng.integers(2) else (liked, (0, 0))
        return draw_references(history, num_liked=liked, num_disliked=disliked, rng=rng)


class VQACollate:
    """Packs examples; runs in the workers."""

    def __init__(self, encoder: PromptEncoder, *, max_length: int, pixels: PixelSource | None) -> None:
        self._encoder = encoder
        self._max_length = max_length
        self._pixels = pixels

    def __call__(self, examples: list[tuple[str, AskedItem]]) -> VQABatch:
        """Batch of examples."""
        asked = [item for _, item in examples]
        packed = pack_batch(self._encoder, items=[a.item for a in asked], max_length=self._max_length)
        pixels = None
        if self._pixels is not None:
            rows, local = torch.unique(packed.image_rows, return_inverse=True)
            packed = replace(packed, image_rows=local)
            pixels = self._pixels.read(rows.tolist())
        return VQABatch(
            packed=packed,
            kinds=tuple(kind for a in asked for kind in a.kinds),
            correct=torch.tensor([c for a in asked for c in a.correct], dtype=torch.long),
            user_ids=tuple(user_id for user_id, _ in examples),
            pixels=pixels,
        )


class PixelSource:
    """Pixels of images by feature row, read from the shards when they are needed."""

    def __init__(self, reader: ShardReader, *, users: Sequence[UserRows], mllm: MLLM) -> None:
        self._reader = reader
        self._starts = torch.tensor([user.first_row for user in users])
        self._pixels = mllm.pixels

    def read(self, rows: list[int]) -> Tensor:
        """(len(rows), 3, H, W); ``rows`` ascending."""
        owners = (torch.searchsorted(self._starts, torch.tensor(rows), right=True) - 1).tolist()
        images = []
        loaded: dict[int, list[Image.Image]] = {}
        for row, owner in zip(rows, owners, strict=True):
            if owner not in loaded:
                sample = self._reader[owner]
                assert sample is not None  # on_bad="raise"
                loaded = {owner: user_images(sample)}
            images.append(loaded[owner][row - int(self._starts[owner])])
        return self._pixels(images)


class VQAData(LightningDataModule):
    """Users of the shards; needs the module's MLLM for prompts and features."""

    def __init__(self, config: VQAConfig) -> None:
        super().__init__()
        self.config = config
        self._splits: dict[Split, SplitFeatures] = {}

    def setup(self, stage: str) -> None:
        """Read users; encode each image once, unless data.cache_features=none."""
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("validation", "test"),
        }
        for split in splits.get(stage, ()):
            if split not in self._splits:
                self._splits[split] = self._load(split)

    def _load(self, split: Split) -> SplitFeatures:
        data, mllm = self.config.data, self._mllm
        shards = shard_root(data.shards, loader=self.config.loader)
        max_users = data.max_users if split == "train" else data.max_eval_users
        if data.cache_features == "none":
            reader = ShardReader(shards, split=split)
            count = min(len(reader), max_users) if max_users else len(reader)
            return SplitFeatures(
                users=tuple(read_users(reader, positions=range(count))), features=torch.zeros(0, 1, 1)
            )
        with rank_zero_first(self.trainer):
            return load_features(
                mllm,
                shards=shards,
                split=split,
                mllm_hash=model_hash(self.config.model.mllm),
                cache=Path(data.feature_cache) if data.feature_cache else None,
                in_bf16=self.config.trainer.precision.startswith("bf16"),
                max_users=max_users,
                device=self.trainer.strategy.root_device if self.trainer is not None else "cpu",
            )

    @property
    def _mllm(self) -> MLLM:
        assert self.trainer is not None
        mllm: MLLM = self.trainer.lightning_module.mllm
        return mllm

    def split(self, name: Split) -> SplitFeatures:
        """Users and features of a split that ``setup`` has read."""
        return self._splits[name]

    def train_dataloader(self) -> ResumableLoader[tuple[str, AskedItem], VQABatch]:
        """New references, queries, orders and answers each epoch."""
        data, questions = self.config.data, self.config.questions
        counts = QuestionCounts(
            like=questions.like,
            choose=questions.choose,
            likes=questions.likes,
            dislikes=questions.dislikes,
            score=questions.score,
            max_listed=questions.max_listed,
        )
        rules = DrawRules(
            purpose="train",
            num_liked=data.num_liked,
            num_disliked=data.num_disliked,
            empty_side_rate=data.empty_side_rate,
            counts=counts,
        )
        return self._loader("train", rules=rules, train=True)

    def val_dataloader(self) -> ResumableLoader[tuple[str, AskedItem], VQABatch]:
        """The same questions at every validation."""
        return self._loader("validation", rules=self._eval_rules(), train=False)

    def test_dataloader(self) -> ResumableLoader[tuple[str, AskedItem], VQABatch]:
        """The same for test users."""
        return self._loader("test", rules=self._eval_rules(), train=False)

    def _eval_rules(self) -> DrawRules:
        data, questions = self.config.data, self.config.questions
        counts = QuestionCounts(
            like=data.eval_queries,
            choose=2,
            score=data.eval_queries if questions.score else 0,
            max_listed=questions.max_listed,
        )
        both = (data.eval_references, data.eval_references)
        return DrawRules(
            purpose="eval", num_liked=both, num_disliked=both, empty_side_rate=0.0, counts=counts
        )

    def _loader(
        self, split: Split, *, rules: DrawRules, train: bool
    ) -> ResumableLoader[tuple[str, AskedItem], VQABatch]:
        users, mllm, pixels = self._splits[split].users, self._mllm, None
        if self.config.data.cache_features == "none":
            root = shard_root(self.config.data.shards, loader=self.config.loader)
            reader = ShardReader(root, split=split)
            pixels = PixelSource(reader, users=users, mllm=mllm)
        assert self.trainer is not None
        dataset = VQADataset(users, rules=rules, seed=self.config.seed)
        budget = None
        if train and self.config.data.max_batch_tokens:
            budget = TokenBudget(
                length=partial(dataset.length, encoder=mllm.encoder),
                max_tokens=self.config.data.max_batch_tokens,
                max_samples=self.config.data.batch_size,
                seed=self.config.seed,
                key="data.max_batch_tokens",
            )
        return ResumableLoader(
            dataset,
            batch_size=self.config.data.batch_size,
            seed=self.config.seed,
            shuffle=train,
            drop_last=train,
            num_workers=self.config.loader.num_workers if train else 0,
            stall_seconds=self.config.loader.stall_seconds,
            collate_fn=VQACollate(mllm.encoder, max_length=mllm.max_length, pixels=pixels),
            rank=int(self.trainer.global_rank),
            world_size=int(self.trainer.world_size),
            budget=budget,
            name=f"users of split {split}",
        )


def _within(bounds: tuple[int, int], *, available: int) -> tuple[int, int]:
    """Bounds that leave an image for a query where the side has two or more."""
    most = min(bounds[1], available - 1 if available > 1 else available)
    return min(bounds[0], most), most
