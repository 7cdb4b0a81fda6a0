"""Guards on the toy stage: losses that are no numbers, full disks, too little memory, clocks."""

import datetime
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from prefgen.checkpoint import list_checkpoints
from prefgen.config import build_config, load_config
from prefgen.errors import ConfigError, PrefgenError, is_disk_full
from prefgen.guards import as_user_error, gradient_norm, memory_advice, sample_keys
from prefgen.progress import ClockBar, RunClock
from prefgen.run import fit
from prefgen.run_noise import quiet_lightning
from prefgen.strategies import make_strategy
from toy_config import ToyConfig
from toy_stage import ToyData, ToyModule


class Spoiled(ToyModule):
    """Its loss is no number at some steps."""

    bad = (2,)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step in self.bad else loss


class Spoiling(Spoiled):
    """Its loss is fine and its gradients are not."""

    def training_step(self, batch, batch_idx):
        loss = ToyModule.training_step(self, batch, batch_idx)
        weight = self.trained[1].weight
        return loss + (0 * weight).sum().sqrt() if self.global_step in self.bad else loss


def toy(tmp_path, *overrides):
    words = [f"workdir={tmp_path}", "checkpoint.every_n_steps=1", "checkpoint.keep_last=9", *overrides]
    return build_config(ToyConfig, where="for stage 'toy'", file=None, overrides=words)


def train(config, *, module=ToyModule):
    with quiet_lightning():
        return fit(config, make_module=lambda: module(config), make_data=lambda: ToyData(config))


def weights(config):
    return [
        torch.load(path, weights_only=True) for path in list_checkpoints(Path(config.run_dir) / "checkpoints")
    ]


@pytest.mark.parametrize(
    ("module", "words"), [(Spoiled, "the loss is nan"), (Spoiling, "the gradient's norm")]
)
def test_a_bad_step_is_skipped_counted_and_named(module, words, tmp_path, caplog):
    config = toy(tmp_path, "optim.weight_decay=0.5")
    with caplog.at_level(logging.WARNING, logger="prefgen"):
        result = train(config, module=module)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "prefgen.guards"]
    assert words in said
    assert "at step 2 (samples: k" in said
    assert "skipped (1 of at most 3)" in said
    after = weights(config)
    assert [content["global_step"] for content in after] == [1, 2, 3, 4, 5, 6]
    kept = [content["state_dict"]["trained.1.weight"] for content in after]
    assert torch.equal(kept[1], kept[2])  # weight decay and moments included: nothing moved
    assert not torch.equal(kept[2], kept[3])
    assert all(torch.isfinite(weight).all() for weight in kept)
    assert after[-1]["callbacks"]["StepGuard"] == {"bad_steps": 1}
    assert 0 < result.metrics["train/grad_norm"] < float("inf")


def test_too_many_bad_steps_stop_the_run_and_the_count_outlives_a_stop(tmp_path):
    class Worse(Spoiled):
        bad = (2, 4)

    with pytest.raises(
        PrefgenError, match=r"the loss is nan at step 4 \(samples: k.*bad step 2 and guard.max"
    ):
        train(toy(tmp_path, "guard.max_bad_steps=1"), module=Worse)
    with pytest.raises(PrefgenError, match="bad step 2"):  # goes on after step 4, where one was counted
        train(toy(tmp_path, "guard.max_bad_steps=1"), module=Worse)
    assert train(toy(tmp_path, "guard.max_bad_steps=2"), module=Worse).exit_code == 0


def test_guards_change_no_bit_of_a_sound_run(tmp_path):
    run = weights(toy(tmp_path / "a")) if train(toy(tmp_path / "a")) else []
    again = weights(toy(tmp_path / "b")) if train(toy(tmp_path / "b", "guard.max_bad_steps=0")) else []
    for one, other in zip(run, again, strict=True):
        assert torch.equal(one["state_dict"]["trained.1.weight"], other["state_dict"]["trained.1.weight"])


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    config = toy(tmp_path, "trainer.max_steps=4")
    folder = Path(config.run_dir) / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step-00000003.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which type torch raises is the question
        train(config)
    assert is_disk_full(caught.value)
    said = str(as_user_error(caught.value, config=config))
    assert said.startswith("the disk is full (")
    assert "free some space" in said
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000001.ckpt", "step-00000002.ckpt"]
    train(config)
    assert list_checkpoints(folder)[-1].name == "step-00000004.ckpt"


def test_out_of_memory_names_what_to_lower(tmp_path):
    config = load_config("inject", overrides=["trainer.precision=32-true", f"workdir={tmp_path}"])
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    said = str(as_user_error(caught.value, config=config))
    assert said.startswith("out of memory (")
    for words in ("lower data.batch_size=", "model.gradient_checkpointing=true", "precision=bf16-mixed"):
        assert words in said
    assert "data.cache_features=none" in memory_advice(load_config("vqa"))
    assert "loader.num_workers" not in memory_advice(load_config("vqa"))
    assert as_user_error(ValueError("something else"), config=config) is None


class Batch(NamedTuple):
    sem: torch.Tensor
    keys: tuple[str, ...]


@pytest.mark.parametrize(
    ("batch", "keys"),
    [
        (Batch(torch.zeros(2), ("a", "b")), ("a", "b")),
        (SimpleNamespace(user_ids=("u1",)), ("u1",)),
        ((torch.zeros(2), ("k1", "k2")), ("k1", "k2")),
        ({"keys": 3}, ()),
        (torch.zeros(2), ()),
    ],
)
def test_sample_keys(batch, keys):
    assert sample_keys(batch) == keys


def test_gradient_norm():
    layer = torch.nn.Linear(2, 2, bias=False)
    assert float(gradient_norm(layer)) == 0
    layer.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert float(gradient_norm(layer)) == 5


def test_clock():
    clock = RunClock(step=10)
    assert clock.end(step=10, total=20) == "end unknown"
    clock._start -= 100
    assert clock.rate(step=20) == pytest.approx(0.1, rel=0.01)
    assert clock.running() == "0:01:40"
    ends = datetime.datetime.now() + datetime.timedelta(seconds=100)
    assert clock.end(step=20, total=30).startswith("0:01:")
    assert f"{ends:%H:%M}" in clock.end(step=20, total=30) or ends.second < 2
    assert clock.end(step=20, total=float("inf")) == "no end set"
    assert clock.end(step=20, total=100_000).count(" ") >= 4  # not today: with the date
    bar = ClockBar()
    bar._clock = clock
    trainer = SimpleNamespace(
        loggers=[], progress_bar_metrics={}, global_step=20, estimated_stepping_batches=30
    )
    assert bar.get_metrics(trainer, None)["run"].startswith("0:01:40, 0:01:")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.strategy=fdsp2"], "'fdsp2' is not one of auto, ddp, fsdp2, deepspeed"),
        (["trainer.deepspeed_config=x.json"], "needs trainer.strategy=deepspeed, got auto"),
        (["guard.max_bad_steps=-1"], "guard.max_bad_steps=-1 must be at least 0"),
        (["loader.stall_seconds=-1"], "loader.stall_seconds=-1 must be at least 0"),
        (["trainer.timeout_minutes=0"], "trainer.timeout_minutes=0 must be at least 1"),
    ],
)
def test_bad_settings(overrides, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        toy(tmp_path, *overrides)


def test_deepspeed_is_accepted_and_says_what_it_needs(tmp_path):
    config = toy(tmp_path, "trainer.strategy=deepspeed", "trainer.deepspeed_config=ds.json")
    with pytest.raises(ConfigError, match="needs the package deepspeed"):
        make_strategy(config.trainer)
