"""The run machinery on a toy stage: resume, signals, EMA, guards, the run folder."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefgen.checkpoint import list_checkpoints
from prefgen.config import build_config
from prefgen.errors import CheckpointError, ConfigError, PrefgenError, StoppedBySignalError
from prefgen.run import check_device, fit, load_weights, use
from prefgen.run_folder import check_same_run
from prefgen.run_noise import quiet_lightning, user_errors
from prefgen.testing.resume import assert_resume_is_exact, assert_same
from toy_config import ToyConfig
from toy_stage import ToyData, ToyModule


def toy(tmp_path, *overrides):
    words = [f"workdir={tmp_path}", *overrides]
    return build_config(ToyConfig, where="for stage 'toy'", file=None, overrides=words)


def train(config, **options):
    with quiet_lightning(), user_errors():
        return fit(
            config, make_module=lambda: ToyModule(config), make_data=lambda: ToyData(config), **options
        )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 7, pytest.param(9, marks=pytest.mark.slow)])
def test_resume_is_exact(tmp_path, num_workers, stop):
    """An epoch has 7 batches: the stop falls inside the first, at its end, inside the second."""
    config = toy(tmp_path, "optim.schedule=cosine", "optim.warmup_steps=2")
    report = assert_resume_is_exact(
        config,
        make_module=ToyModule,
        make_data=ToyData,
        tmp_path=tmp_path,
        num_workers=num_workers,
        steps=11,
        stop=stop,
    )
    assert len(set(report.straight_batches)) == 11


@pytest.mark.parametrize("validation", ["trainer.val_check_interval=3", "trainer.limit_val_batches=0"])
def test_resume_is_exact_beside_validation_and_accumulation(tmp_path, validation):
    config = toy(tmp_path, validation, "trainer.accumulate_grad_batches=2", "checkpoint.monitor=null")
    assert_resume_is_exact(
        config, make_module=ToyModule, make_data=ToyData, tmp_path=tmp_path, steps=6, stop=3, ema_decay=None
    )


def test_resume_test_can_fail(tmp_path):
    """A loader that starts its epoch anew after a resume is caught."""

    class Forgetful(ToyData):
        def train_dataloader(self):
            loader = super().train_dataloader()
            loader.load_state_dict = lambda state: None
            return loader

    with pytest.raises(AssertionError, match="saw other batches"):
        assert_resume_is_exact(
            toy(tmp_path), make_module=ToyModule, make_data=Forgetful, tmp_path=tmp_path, steps=4, stop=2
        )


def test_a_fit_leaves_its_folder(tmp_path):
    config = toy(tmp_path, "trainer.validate_before_fit=true", "checkpoint.every_n_steps=2")
    result = train(config)
    run_dir = Path(config.run_dir)
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == [
        "step-00000004.ckpt",
        "step-00000006.ckpt",
    ]
    assert (run_dir / "config.yaml").is_file()
    assert list((run_dir / "tensorboard").glob("events*"))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["stage"] == "align"
    assert metrics["steps"] == 6
    assert metrics["before"].keys() == {"val/loss"}
    assert "train/loss" in metrics["fit"]
    assert all(place.exists() for place in result.places.values())
    assert result.places["artefact"].name == "toy.txt"


def test_checkpoint_holds_trained_parts_only(tmp_path):
    config = toy(tmp_path)
    train(config)
    path = list_checkpoints(Path(config.run_dir) / "checkpoints")[-1]
    content = torch.load(path, weights_only=True)
    assert content["state_dict"].keys() == {"trained.1.weight", "trained.1.bias", "trained.count"}


def test_again_goes_on_and_ends_at_once(tmp_path):
    config = toy(tmp_path)
    train(config)
    first = (Path(config.run_dir) / "metrics.json").read_text()
    train(config)
    assert (Path(config.run_dir) / "metrics.json").read_text() == first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyModule, "__init__", None)  # a finished run is not even built
        assert train(config).places["artefact"].is_file()
    (Path(config.run_dir) / "toy.txt").unlink()
    train(config)
    assert (Path(config.run_dir) / "toy.txt").is_file()
    longer = replace(config, trainer=replace(config.trainer, max_steps=8))
    train(longer)
    assert json.loads((Path(config.run_dir) / "metrics.json").read_text())["steps"] == 8


@pytest.mark.parametrize(
    "change",
    ["trainer.max_steps=7", "trainer.log_every_n_steps=2", "loader.num_workers=1", "trainer.max_epochs=9"],
)
def test_what_may_change(tmp_path, change):
    train(toy(tmp_path, "trainer.max_steps=2"))
    overrides = ["trainer.max_steps=2"] if "max_steps" not in change else []
    train(toy(tmp_path, *overrides, change))


@pytest.mark.parametrize("change", ["data.batch_size=1", "seed=5", "toy.name=other", "optim.betas=[0.5,0.9]"])
def test_what_may_not_change(tmp_path, change):
    train(toy(tmp_path, "trainer.max_steps=2"))
    with pytest.raises(ConfigError, match=change.partition("=")[0]):
        train(toy(tmp_path, "trainer.max_steps=2", change))


def test_inputs_that_changed_are_refused_finished_or_not(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "index.json").write_text("first")
    for steps in (6, 8):  # the finished run, and the same one asked to go on
        config = toy(tmp_path, f"trainer.max_steps={steps}")
        train(config)
        (shards / "index.json").write_text("second")
        with pytest.raises(
            CheckpointError, match=r"another embedding shards \(data.shards=.* has changed since"
        ):
            train(config)
        (shards / "index.json").write_text("first")


def test_a_folder_may_move(tmp_path):
    train(toy(tmp_path / "a", "trainer.max_steps=2", "data.shards=x"))
    (tmp_path / "a").rename(tmp_path / "b")
    train(toy(tmp_path / "b", "trainer.max_steps=3", "data.shards=x"))


def test_torn_checkpoint(tmp_path):
    config = toy(tmp_path)
    train(config)
    path = list_checkpoints(Path(config.run_dir) / "checkpoints")[-1]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(toy(tmp_path, "trainer.max_steps=7"))


def spoil(path, how):
    data = bytearray(path.read_bytes())
    if how == "torn":
        del data[-200:]
    elif how == "empty":
        data.clear()
    elif how == "flipped":  # one bit of a tensor, which torch.load alone would read
        weight = torch.load(path, weights_only=True)["state_dict"]["trained.1.weight"].numpy().tobytes()
        data[data.find(weight) + 5] ^= 4
    elif how == "foreign":
        content = torch.load(path, weights_only=True)
        content["hyper_parameters"]["stage"] = "vqa"
        torch.save(content, path)
        return
    elif how == "other shape":
        content = torch.load(path, weights_only=True)
        content["state_dict"]["trained.1.weight"] = torch.zeros(7, 4)
        torch.save(content, path)
        return
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["torn", "empty", "flipped", "foreign", "other shape"])
def test_a_checkpoint_that_cannot_be_used_is_refused_and_the_one_before_it_used(how, tmp_path, caplog):
    settings = ("checkpoint.every_n_steps=2", "checkpoint.keep_last=3")
    straight = train(toy(tmp_path / "straight", *settings, "trainer.max_steps=7"))
    config = toy(tmp_path, *settings)
    train(config)
    folder = Path(config.run_dir) / "checkpoints"
    spoil(folder / "step-00000006.ckpt", how)
    with caplog.at_level("INFO", logger="prefgen"):
        resumed = train(toy(tmp_path, *settings, "trainer.max_steps=7"))
    assert "step-00000006.ckpt" in caplog.text
    assert "the checkpoint before it is tried" in caplog.text
    assert "going on from" in caplog.text
    assert "(step 4)" in caplog.text
    assert (folder / "step-00000006.ckpt.refused").is_file()
    one, other = (torch.load(r.places["checkpoint"], weights_only=True) for r in (straight, resumed))
    assert torch.equal(one["state_dict"]["trained.1.weight"], other["state_dict"]["trained.1.weight"])


def test_ranks_may_change_while_the_samples_of_a_step_stay(tmp_path):
    train(toy(tmp_path, "trainer.max_steps=2", "data.batch_size=4"))
    config = toy(
        tmp_path, "trainer.max_steps=4", "data.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp"
    )
    check_same_run(Path(config.run_dir), config=config)
    for words, key in (
        (("trainer.devices=3",), "data.batch_size|trainer.devices"),
        (("trainer.strategy=fsdp2", "data.batch_size=4"), "trainer.strategy"),
    ):
        with pytest.raises(ConfigError, match=key):
            check_same_run(Path(config.run_dir), config=toy(tmp_path, "trainer.max_steps=4", *words))


def test_a_half_written_checkpoint_is_never_picked(tmp_path):
    config = toy(tmp_path)
    train(config)
    folder = Path(config.run_dir) / "checkpoints"
    (folder / "step-00000099.ckpt.part").write_bytes(b"half")
    assert load_weights(config, module=ToyModule(config)).name == "step-00000006.ckpt"


def test_ema_is_validated_and_exported(tmp_path):
    config = toy(tmp_path, "optim.ema_decay=0.99", "optim.learning_rate=0.1")
    result = train(config)
    content = torch.load(result.places["checkpoint"], weights_only=True)
    own = content["state_dict"]["trained.1.weight"]
    average = content["callbacks"]["TrainedEMA"]["shadow"]["trained.1.weight"]
    assert content["callbacks"]["TrainedEMA"]["shadow"].keys() == {"trained.1.weight", "trained.1.bias"}
    assert not torch.equal(own, average)
    exported = float((Path(config.run_dir) / "toy.txt").read_text())
    assert exported == pytest.approx(float(average.sum()), abs=1e-6)


def test_best_checkpoint_is_exported(tmp_path):
    """With the sign of the loss turned, validation gets worse and worse: the first is the best."""
    config = toy(
        tmp_path, "toy.factor=-1", "checkpoint.monitor=val/loss", "trainer.val_check_interval=2",
        "optim.learning_rate=0.1",
    )  # fmt: skip
    result = train(config)
    assert result.places["checkpoint"].name == "best.ckpt"
    best = torch.load(result.places["checkpoint"], weights_only=True)
    assert best["global_step"] == 2
    exported = float((Path(config.run_dir) / "toy.txt").read_text())
    assert exported == pytest.approx(float(best["state_dict"]["trained.1.weight"].sum()), abs=1e-6)


def test_early_stopping(tmp_path):
    config = toy(
        tmp_path, "toy.factor=-1", "checkpoint.monitor=val/loss", "trainer.val_check_interval=2",
        "optim.learning_rate=0.1", "optim.early_stopping_patience=1", "trainer.max_steps=50",
    )  # fmt: skip
    train(config)
    metrics = json.loads((Path(config.run_dir) / "metrics.json").read_text())
    assert metrics["stopped_early"] is True
    assert metrics["steps"] == 4
    train(config)
    assert json.loads((Path(config.run_dir) / "metrics.json").read_text())["steps"] == 4


def test_monitor_that_is_not_measured(tmp_path):
    config = toy(tmp_path, "checkpoint.monitor=val/los", "trainer.val_check_interval=2")
    with pytest.raises(ConfigError, match="checkpoint.monitor=val/los is not measured; metrics: .*val/loss"):
        train(config)


def test_loss_that_is_not_finite(tmp_path):
    config = toy(tmp_path, "optim.learning_rate=1e30", "trainer.gradient_clip_val=null")
    with pytest.raises(PrefgenError, match="the loss is .* at step .*; lower optim.learning_rate"):
        train(config)


def test_validate_test_and_predict(tmp_path):
    config = toy(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in .*; run 'prefgen fit --stage align"):
        use(config, verb="validate", module=ToyModule(config), data=ToyData(config))
    train(config)
    with quiet_lightning():
        for verb in ("validate", "test"):
            result = use(config, verb=verb, module=ToyModule(config), data=ToyData(config))
            assert list(result.metrics) == [f"{'val' if verb == 'validate' else 'test'}/loss"]
        result = use(config, verb="predict", module=ToyModule(config), data=ToyData(config))
    assert result.places["predictions"].read_text() == "False 7"
    metrics = json.loads((Path(config.run_dir) / "metrics.json").read_text())
    assert {"fit", "validate", "test"} <= metrics.keys()


def test_half_precision_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="16-mixed needs a GPU"):
        check_device(toy(tmp_path, "trainer.accelerator=auto", "trainer.precision=16-mixed"))
    with pytest.raises(ConfigError, match="accelerator=gpu"):
        check_device(toy(tmp_path, "trainer.accelerator=gpu"))


def test_the_same_seed_gives_the_same_run(tmp_path):
    results = [train(toy(tmp_path / name)).metrics for name in "ab"]
    assert results[0] == results[1]


def test_sharding_over_one_rank_is_the_plain_run(tmp_path):
    """All of fsdp2's way (cutting up, gathering, saving, going on, exporting) but the second process."""
    plain = train(toy(tmp_path / "plain", "optim.ema_decay=0.5"))
    sharded = ("optim.ema_decay=0.5", "trainer.strategy=fsdp2", "trainer.max_steps=3")
    try:
        train(toy(tmp_path / "sharded", *sharded))
        again = train(toy(tmp_path / "sharded", *sharded[:2], "trainer.max_steps=6"))
    finally:
        torch.distributed.destroy_process_group()
    one, other = (torch.load(r.places["checkpoint"], weights_only=True) for r in (plain, again))
    for part in ("state_dict", "callbacks"):
        assert_same(one[part], other[part], where=part)
    assert plain.places["artefact"].read_text() == again.places["artefact"].read_text()


SCRIPT = f"""
import os, sys, time, types
sys.path.insert(0, {str(Path(__file__).parent)!r})
import prefgen.stages as stages
from prefgen.stages import StageEntry
stages.STAGES["align"] = StageEntry(
    config="toy_config:ToyConfig", data="toy_stage:ToyData", module="slow_toy:SlowToy")
import prefgen.run, toy_stage
slow = types.ModuleType("slow_toy")
class SlowToy(toy_stage.ToyModule):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step >= 2:
            time.sleep(float(os.environ["NAP"]))
        return super().training_step(batch, batch_idx)
slow.SlowToy = SlowToy
sys.modules["slow_toy"] = slow
from prefgen.cli import main
sys.exit(main(sys.argv[1:]))
"""


def fit_words(tmp_path, *more, steps):
    (tmp_path / "shards").mkdir(exist_ok=True)
    (tmp_path / "shards" / "index.json").write_text("{}")
    (tmp_path / "empty.yaml").write_text("")
    words = ["fit", "--stage", "align", "--config", str(tmp_path / "empty.yaml"), f"workdir={tmp_path}"]
    words += [f"trainer.max_steps={steps}", "checkpoint.every_n_steps=1", "trainer.num_threads=1"]
    return [*words, *more]


def start(tmp_path, *more, nap, steps, **variables):
    """A command of its own from the first import on: what starts further ranks, or asks Slurm."""
    script = tmp_path / "toy_command.py"  # a file, since Lightning starts further ranks by it
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONWARNINGS": "default", "NAP": str(nap), **variables}
    return subprocess.Popen(
        [sys.executable, str(script), *fit_words(tmp_path, *more, steps=steps)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def wait_for_step(tmp_path, process, *, step):
    deadline = time.monotonic() + 90
    while not any(int(p.stem[5:]) >= step for p in list_checkpoints(tmp_path / "toy" / "checkpoints")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint in 90 s"
        time.sleep(0.05)


@pytest.mark.slow
def test_slurms_warning_signal_saves_and_requeues(tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS_PER_NODE": "1", "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    process = start(tmp_path, nap=0.2, steps=500, **slurm)
    try:
        wait_for_step(tmp_path, process, step=2)
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGUSR1, err
    assert "stopped by SIGUSR1 after step" in err
    assert "job 4711 is back in the queue" in err
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    last = list_checkpoints(tmp_path / "toy" / "checkpoints")[-1]
    again = start(tmp_path, nap=0, steps=int(last.stem[5:]) + 1, **slurm)
    _, err = again.communicate(timeout=90)
    assert again.returncode == 0, err
    assert f"going on from {last}" in err


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_other_and_loses_nothing(tmp_path, victim):
    two = ("trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=1")
    process = start(tmp_path, *two, nap=0.2, steps=500)
    second = None
    try:
        wait_for_step(tmp_path, process, step=2)
        (second,) = children_of(process.pid)
        os.kill(process.pid if victim == 0 else second, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{second}").exists():
            assert time.monotonic() < deadline, "the second rank hangs"
            time.sleep(0.1)
    finally:
        process.kill()
        if second is not None and Path(f"/proc/{second}").exists():
            os.kill(second, signal.SIGKILL)
    assert process.returncode not in (0, None)
    if victim == 1:
        assert "another rank died or hangs" in err or process.returncode == -signal.SIGKILL, err
    last = list_checkpoints(tmp_path / "toy" / "checkpoints")[-1]
    again = start(tmp_path, *two, nap=0, steps=int(last.stem[5:]) + 1)
    _, err = again.communicate(timeout=90)
    assert again.returncode == 0, err


def children_of(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_signal_to_the_second_rank_alone_stops_both(tmp_path):
    """Lightning hears signals on rank 0 only: a node that is shut down may be another one."""
    two = ("trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=1")
    process = start(tmp_path, *two, nap=0.2, steps=500)
    try:
        wait_for_step(tmp_path, process, step=2)
        (second,) = children_of(process.pid)
        os.kill(second, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "run the same command again to go on" in err
    assert "Traceback" not in err
    last = list_checkpoints(tmp_path / "toy" / "checkpoints")[-1]
    again = start(tmp_path, *two, nap=0, steps=int(last.stem[5:]) + 1)
    _, err = again.communicate(timeout=90)
    assert again.returncode == 0, err
    assert f"going on from {last}" in err


def test_stop_is_an_error_of_ours(tmp_path):
    with pytest.raises(StoppedBySignalError):
        train(toy(tmp_path), stop_at_step=2)
