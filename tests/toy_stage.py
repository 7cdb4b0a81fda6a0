"""A stage of a few numbers, built like the real ones, to test the frame with."""

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from prefgen.data.loader import ResumableLoader
from prefgen.stages.base import StageModule


@dataclass(frozen=True)
class ToyDataset:
    """Sample i at epoch e is a function of (i, e)."""

    size: int = 14

    def __len__(self):
        return self.size

    def example(self, index, *, epoch):
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        return torch.randn(4, generator=generator), f"k{index}/{epoch}"


def collate(examples):
    """Stack."""
    return torch.stack([x for x, _ in examples]), tuple(key for _, key in examples)


class ToyData(LightningDataModule):
    """Seven batches of two an epoch by default."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def train_dataloader(self):
        return self._loader(shuffle=True)

    def val_dataloader(self):
        return self._loader(shuffle=False)

    test_dataloader = val_dataloader

    def _loader(self, *, shuffle):
        return ResumableLoader(
            ToyDataset(),
            batch_size=self.config.data.batch_size,
            seed=self.config.seed,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.config.loader.num_workers,
            collate_fn=collate,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )


class ToyModule(StageModule):
    """A frozen layer, a dropout, a trained layer with a statistic."""

    stage = "align"

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.frozen.register_buffer("mean", torch.zeros(4))
        self.trained = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, config.toy.width))
        self.trained.register_buffer("count", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        self.trained.count += 1
        loss = self.trained(self.frozen(x)).square().mean() * self.config.toy.factor
        self.log("train/loss", loss, batch_size=len(x))
        return loss

    def validation_step(self, batch, batch_idx):
        x, _ = batch
        self.log("val/loss", self.trained(self.frozen(x)).square().mean(), batch_size=len(x))

    def test_step(self, batch, batch_idx):
        x, _ = batch
        self.log("test/loss", self.trained(self.frozen(x)).square().mean(), batch_size=len(x))

    def export(self, run_dir):
        path = run_dir / "toy.txt"
        path.write_text(str(float(self.trained[1].weight.detach().sum())))
        return path

    def predict(self, data, *, part=None):
        path = self.run_dir / "predicted.txt"
        path.write_text(f"{self.training} {len(data.val_dataloader())}")
        return path
