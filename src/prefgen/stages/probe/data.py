"""Prompts for the probes, and batches of sample numbers: the module keeps the pooled states themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from prefgen.data.loader import ResumableLoader
from prefgen.models.mllm import MLLM
from prefgen.schema import Split
from prefgen.stages.base import rank_zero_first, shard_root
from prefgen.stages.features import SplitFeatures, load_features, model_hash
from prefgen.stages.probe.config import ProbeConfig
from prefgen.stages.probe.draws import ProbeSamples, inter_samples, intra_samples

Task = Literal["inter", "intra"]
TASKS: tuple[Task, ...] = get_args(Task)
"""Tasks by what is asked; inter may be read at two places (data.inter_target)."""


@dataclass(frozen=True, kw_only=True)
class TaskPrompts:
    """Prompts of one task: those trained on and those held out, each with the features of its split."""

    train: ProbeSamples
    train_features: Tensor
    test: ProbeSamples
    test_features: Tensor


@dataclass(frozen=True, kw_only=True)
class ProbeBatch:
    """Numbers of training samples, by task."""

    inter: Tensor
    intra: Tensor

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the samples, for messages."""
        return tuple(f"{task} {n}" for task in TASKS for n in getattr(self, task).tolist())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ProbeBatch:
        """Tensors on another device (the signature Lightning calls)."""
        return replace(
            self,
            inter=self.inter.to(device, non_blocking=non_blocking),
            intra=self.intra.to(device, non_blocking=non_blocking),
        )


class SampleNumbers:
    """Training samples of both tasks, one after the other."""

    def __init__(self, *, num_inter: int, num_intra: int) -> None:
        self._inter, self._intra = num_inter, num_intra

    def __len__(self) -> int:
        return self._inter + self._intra

    def example(self, index: int, *, epoch: int) -> tuple[Task, int]:
        """Task and number within it."""
        del epoch
        return ("inter", index) if index < self._inter else ("intra", index - self._inter)


def collate(examples: list[tuple[Task, int]]) -> ProbeBatch:
    """Numbers by task; a task may have none in a batch."""
    numbers = {task: [n for name, n in examples if name == task] for task in TASKS}
    return ProbeBatch(
        inter=torch.tensor(numbers["inter"], dtype=torch.long),
        intra=torch.tensor(numbers["intra"], dtype=torch.long),
    )


class ProbeData(LightningDataModule):
    """Validation users to be told apart; training users teach like and dislike, validation users test it."""

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__()
        self.config = config
        self.prompts: dict[Task, TaskPrompts] = {}

    def setup(self, stage: str) -> None:
        """Draw the prompts; nothing to do for predict and test, which read the shards themselves."""
        if stage in ("predict", "test") or self.prompts:
            return
        data, seed = self.config.data, self.config.seed
        train, held_out = self.load("train"), self.load("validation")
        inter_users = held_out.users[: data.inter_users]
        inter = partial(
            inter_samples,
            inter_users,
            num_references=data.inter_references,
            seed=seed,
            sides=data.sides,
            with_target=data.inter_target,
        )
        self.prompts["inter"] = TaskPrompts(
            train=inter(part="train", num_draws=data.inter_train_draws),
            train_features=held_out.features,
            test=inter(part="test", num_draws=data.inter_test_draws),
            test_features=held_out.features,
        )
        intra = partial(
            intra_samples,
            num_references=data.intra_references,
            num_queries=data.intra_queries,
            seed=seed,
            sides=data.sides,
        )
        self.prompts["intra"] = TaskPrompts(
            train=intra(train.users[: data.intra_users]),
            train_features=train.features,
            test=intra(held_out.users),
            test_features=held_out.features,
        )

    def load(self, split: Split, *, max_users: int = 0) -> SplitFeatures:
        """Users of a split with their features; only the first so many, 0 takes all."""
        assert self.trainer is not None
        mllm: MLLM = self.trainer.lightning_module.mllm
        with rank_zero_first(self.trainer):
            return load_split(
                self.config,
                mllm=mllm,
                split=split,
                device=self.trainer.strategy.root_device,
                users=range(max_users) if max_users else None,
            )

    def train_dataloader(self) -> ResumableLoader[tuple[Task, int], ProbeBatch]:
        """Sample numbers in a new order each epoch."""
        assert self.trainer is not None
        dataset = SampleNumbers(
            num_inter=len(self.prompts["inter"].train.labels),
            num_intra=len(self.prompts["intra"].train.labels),
        )
        return ResumableLoader(
            dataset,
            batch_size=min(self.config.data.batch_size, len(dataset)),
            seed=self.config.seed,
            shuffle=True,
            drop_last=True,
            num_workers=self.config.loader.num_workers,
            stall_seconds=self.config.loader.stall_seconds,
            collate_fn=collate,
            rank=int(self.trainer.global_rank),
            world_size=int(self.trainer.world_size),
            name="probe samples",
        )

    def val_dataloader(self) -> DataLoader[int]:
        """One tick: the module measures on all held-out samples, which it keeps."""
        return DataLoader([0], batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[int]:
        """One tick: the module reads the test users."""
        return self.val_dataloader()


def load_split(
    config: ProbeConfig,
    *,
    mllm: MLLM,
    split: Split,
    device: torch.device | str,
    users: range | None = None,
) -> SplitFeatures:
    """All users of a split, or some, with their features, from the cache that stage vqa has filled."""
    data = config.data
    return load_features(
        mllm,
        shards=shard_root(data.shards, loader=config.loader),
        split=split,
        mllm_hash=model_hash(config.model.mllm),
        cache=Path(data.feature_cache) if data.feature_cache else None,
        in_bf16=config.trainer.precision.startswith("bf16"),
        users=users,
        device=device,
    )
