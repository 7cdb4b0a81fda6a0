"""Five steps give the losses they gave when they were noted; see ``how`` in the file."""

import json
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from prefgen.run import fit
from prefgen.stages.align.data import AlignData
from prefgen.stages.align.module import AlignModule

GOLDEN = Path(__file__).parents[2] / "golden" / "align.json"


class _Losses(Callback):
    def __init__(self):
        self.values = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.values.append(float(loss.detach()))


def five_losses(make_config):
    config = make_config("trainer.max_steps=5", "trainer.val_check_interval=1000", "optim.learning_rate=1e-2")
    losses = _Losses()
    fit(
        config,
        make_module=lambda: AlignModule(config),
        make_data=lambda: AlignData(config),
        extra_callbacks=(losses,),
    )
    return losses.values


def test_five_losses(make_config):
    noted = json.loads(GOLDEN.read_text())
    # One part in 1e4 leaves room for another BLAS, and none for another batch, draw or weight.
    assert five_losses(make_config) == pytest.approx(noted["losses"], rel=1e-4)
