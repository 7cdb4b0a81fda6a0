"""Going on after a stop or a kill is the run that was never stopped, bit for bit."""

import signal
from pathlib import Path

import pytest
import torch

from prefgen.checkpoint import list_checkpoints
from prefgen.run import run_stage
from prefgen.stages.align.data import AlignData
from prefgen.stages.align.module import AlignModule
from prefgen.testing.resume import assert_resume_is_exact, assert_same
from zygote import Zygote


@pytest.mark.parametrize("num_workers", [0, 2])
def test_three_and_three_steps_are_six(make_config, tmp_path, num_workers):
    # Two batches an epoch: the stop after step 3 falls inside the second epoch.
    report = assert_resume_is_exact(
        make_config(),
        make_module=AlignModule,
        make_data=AlignData,
        tmp_path=tmp_path,
        num_workers=num_workers,
    )
    assert len(set(report.straight_batches)) == 6


def test_directions_drawn_at_each_step_survive_a_stop(make_config, tmp_path):
    assert_resume_is_exact(
        make_config("align.mmd_weight=0", "align.sliced_wasserstein_weight=1"),
        make_module=AlignModule,
        make_data=AlignData,
        tmp_path=tmp_path,
    )


def test_workers_do_not_change_what_is_seen(make_config, tmp_path):
    seen = [
        assert_resume_is_exact(
            make_config(),
            make_module=AlignModule,
            make_data=AlignData,
            tmp_path=tmp_path / str(num_workers),
            num_workers=num_workers,
            steps=4,
            stop=2,
        ).straight_batches
        for num_workers in (0, 2)
    ]
    assert seen[0] == seen[1]


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    prelude = "import prefgen.run, prefgen.stages.align.data, prefgen.stages.align.module"
    started = Zygote(prelude, folder=tmp_path_factory.mktemp("zygote"))
    yield started
    started.close()


def _words(config):
    keys = {
        "workdir": config.workdir,
        "run_dir": config.run_dir,
        "model.pipeline": config.model.pipeline,
        "model.hidden_width": 16,
        "data.batch_size": 8,
        "data.orders_per_user": 2,
        "align.group_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.validate_before_fit": "false",
        "trainer.max_steps": config.trainer.max_steps,
        "trainer.val_check_interval": 1000,
        "trainer.num_threads": 1,
        "optim.warmup_steps": 1,
        "checkpoint.every_n_steps": config.checkpoint.every_n_steps,
    }
    return ["fit", "--stage", "align", *(f"{key}={value}" for key, value in keys.items())]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_writes_a_checkpoint_and_says_how_to_go_on(zygote, make_config, number):
    config = make_config("trainer.max_steps=5000", "checkpoint.every_n_steps=10")
    folder = Path(config.run_dir) / "checkpoints"
    process = zygote.start(*_words(config))
    try:
        process.wait_for(folder / "step-00000010.ckpt")
        process.send_signal(number)
    except BaseException:
        process.send_signal(signal.SIGKILL)
        raise
    status, _, err = process.wait()
    assert status == 128 + number, err
    assert f"stopped by {number.name} after step" in err
    assert "run the same command again to go on" in err
    assert "Traceback" not in err
    assert err.splitlines()[0].startswith("fit align: preset mini, run folder ")
    assert config.run_dir in err.splitlines()[0]
    if number != signal.SIGTERM:
        return
    last = list_checkpoints(folder)[-1]
    further = make_config(f"trainer.max_steps={int(last.stem[5:]) + 1}", "checkpoint.every_n_steps=10")
    status, out, err = zygote.start(*_words(further)).wait()
    assert status == 0, err
    assert f"going on from {last}" in err
    assert "artefact: " in out
    assert "checkpoint: " in out
    assert "log: " in out


def test_kill_9_and_the_same_command_again(zygote, make_config):
    every = 10
    common = ("trainer.max_steps=80", "trainer.val_check_interval=1000", f"checkpoint.every_n_steps={every}")
    killed, straight = (make_config(*common, run_dir=name) for name in ("killed", "straight"))
    folder = Path(killed.run_dir) / "checkpoints"
    process = zygote.start(*_words(killed))
    try:
        process.wait_for(folder / f"step-{every:08d}.ckpt")
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait()[0] == -signal.SIGKILL
    stopped_at = list_checkpoints(folder)[-1]
    assert stopped_at.name != "step-00000080.ckpt", "it was through before the kill"

    status, _, err = zygote.start(*_words(killed)).wait()
    assert status == 0, err
    assert f"going on from {stopped_at}" in err

    run_stage(straight, verb="fit", stage="align")
    one, other = (
        torch.load(Path(config.run_dir) / "checkpoints/step-00000080.ckpt", weights_only=True)
        for config in (straight, killed)
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(one[part], other[part], where=part)
    artefacts = [(Path(c.run_dir) / "projector.safetensors").read_bytes() for c in (straight, killed)]
    assert artefacts[0] == artefacts[1]
