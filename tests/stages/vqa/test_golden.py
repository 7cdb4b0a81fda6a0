"""Five steps give the losses they gave when they were noted; see ``how`` in the file."""

import json
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from prefgen.run import fit
from prefgen.run_noise import quiet_lightning
from prefgen.stages.vqa.data import VQAData
from prefgen.stages.vqa.module import VQAModule

GOLDEN = Path(__file__).parents[2] / "golden" / "vqa.json"


class _Losses(Callback):
    def __init__(self):
        self.values = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.values.append(float(loss.detach()))


def five_losses(make_config):
    config = make_config("trainer.max_steps=5", "trainer.val_check_interval=1000", "optim.learning_rate=1e-2")
    losses = _Losses()
    with quiet_lightning():
        fit(
            config,
            make_module=lambda: VQAModule(config),
            make_data=lambda: VQAData(config),
            extra_callbacks=(losses,),
        )
    return losses.values


def test_five_losses(make_config):
    noted = json.loads(GOLDEN.read_text())
    assert five_losses(make_config) == pytest.approx(noted["losses"], rel=1e-4)
