"""The first losses of stage inject do not move unnoticed."""

import json
from pathlib import Path

import pytest
import torch

from prefgen.stages.inject.data import InjectData
from prefgen.stages.inject.module import InjectModule

GOLDEN = Path(__file__).parents[2] / "golden" / "inject.json"


def five_losses(make_config):
    """Losses of five optimizer steps."""
    config = make_config("inject.part_drop_rate=0.3")
    module = InjectModule(config)
    module.log = lambda *args, **kwargs: None
    data = InjectData(config, image_size=module.bundle.image_size)
    rows = data.statistics()
    module.adapter.fusion.standardise(module._parts(sem=rows["sem"], core=rows["core"], image=rows["image"]))
    optimizer = torch.optim.AdamW(module.trained_parameters(), lr=1e-3)
    loader = data.train_dataloader()
    losses = []
    for batch in [*loader, *loader][:5]:
        optimizer.zero_grad()
        loss = module.training_step(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_first_five_losses(make_config):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert five_losses(make_config) == pytest.approx(golden["losses"], abs=1e-4)
