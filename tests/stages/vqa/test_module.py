import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from prefgen.config import build_config, load_config
from prefgen.errors import ConfigError
from prefgen.models.mllm import MLLM
from prefgen.models.scoring import like_accuracy
from prefgen.run import fit, use
from prefgen.run_noise import quiet_lightning
from prefgen.stages.features import load_features
from prefgen.stages.vqa.config import VQAConfig
from prefgen.stages.vqa.data import VQAData
from prefgen.stages.vqa.module import VQAModule
from prefgen.testing.resume import assert_resume_is_exact


def train(config):
    with quiet_lightning():
        return fit(config, make_module=lambda: VQAModule(config), make_data=lambda: VQAData(config))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_three_and_three_steps_are_six(make_config, tmp_path, num_workers):
    report = assert_resume_is_exact(
        make_config("model.lora_dropout=0.1"),
        make_module=VQAModule,
        make_data=VQAData,
        tmp_path=tmp_path,
        num_workers=num_workers,
    )
    assert len(set(report.straight_batches)) == 6


@pytest.mark.slow
def test_batches_by_tokens_resume_exactly_too(make_config, tmp_path):
    """Four steps are more than one epoch of 16 users under this budget, so epochs differ in length."""
    report = assert_resume_is_exact(
        make_config("data.max_batch_tokens=900", "data.batch_size=8"),
        make_module=VQAModule,
        make_data=VQAData,
        tmp_path=tmp_path,
    )
    assert len(set(report.straight_batches)) == 6


@pytest.fixture(scope="module")
def noted(inputs, tmp_path_factory):
    """A run with every output, shared by the tests that only look at it."""
    run_dir = tmp_path_factory.mktemp("run")
    words = {
        "workdir": inputs,
        "run_dir": run_dir,
        "model.mllm": inputs / "mllm",
        "model.lora_rank": 2,
        "data.batch_size": 8,
        "data.eval_references": 3,
        "trainer.precision": "32-true",
        "trainer.validate_before_fit": "true",
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "questions.num_listed_users": 1,
    }
    config = load_config("vqa", overrides=[f"{key}={value}" for key, value in words.items()])
    train(config)
    return config, run_dir


def test_metrics_hold_each_kind_before_and_after(noted):
    _, run_dir = noted
    metrics = json.loads((run_dir / "metrics.json").read_text())
    names = {"val/accuracy_like", "val/accuracy_choose", "val/likes_precision", "val/likes_recall"}
    names |= {"val/dislikes_precision", "val/dislikes_recall"}
    names |= {f"val/loss_{kind}" for kind in ("like", "choose", "likes", "dislikes")}
    for when in ("before", "fit"):
        assert names <= metrics[when].keys()


def test_checkpoint_and_artefact_hold_lora_only(noted):
    config, run_dir = noted
    module = VQAModule(config)
    trained = sum(p.numel() for p in module.trained_parameters())
    frozen = sum(p.numel() for p in module.parameters()) - trained
    assert 4 * trained + 20_000 < 4 * frozen, "or the sizes below would show nothing"
    (checkpoint,) = (run_dir / "checkpoints").glob("step-*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert all("lora_" in name for name in content["state_dict"])
    assert (run_dir / "lora" / "adapter_model.safetensors").stat().st_size < 4 * trained + 20_000
    assert sorted(path.name for path in (run_dir / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "prefgen.json",
    ]


def test_test_split_is_measured_with_the_trained_lora(noted):
    config, _ = noted
    with quiet_lightning():
        result = use(config, verb="test", module=VQAModule(config), data=VQAData(config))
    assert 0 <= result.metrics["test/accuracy_like"] <= 1


def test_question_loss_is_a_mean_over_questions(make_config):
    module = VQAModule(make_config("questions.first_token_weight=3"))

    class Fake:
        target_questions = torch.tensor([0, 0, 2])
        num_questions = 3

    losses = module._question_losses(torch.tensor([1.0, 5.0, 7.0]), batch=Fake)
    torch.testing.assert_close(losses, torch.tensor([(3 + 5) / 4, 0.0, 7.0]))


def test_like_accuracy_is_pure_and_swaps(inputs):
    mllm = MLLM.load(inputs / "mllm")
    split = load_features(mllm, shards=inputs / "shards", split="test", mllm_hash="x", cache=None)
    options = {"users": split.users, "image_features": split.features, "num_references": (3, 3)}
    one = like_accuracy(mllm, **options, num_queries=4, batch_size=3)
    again = like_accuracy(mllm, **options, num_queries=4, batch_size=8)
    np.testing.assert_allclose(one.probability, again.probability, atol=1e-5)
    assert len(one.probability) == 4 * len(split.users)
    assert one.liked.mean() == 0.5
    assert len(one.per_user()) == len(split.users)
    swapped = like_accuracy(mllm, **options, num_queries=4, swap_histories=True)
    assert np.array_equal(swapped.liked, one.liked)
    assert not np.allclose(swapped.probability, one.probability)
    sure = replace(one, probability=one.liked.astype(float))
    assert sure.correct.mean() == 1.0
    assert replace(one, probability=np.full(len(one.liked), 0.5)).correct.mean() == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.num_liked=[5,2]"], r"data.num_liked=\(5, 2\)"),
        (["data.num_liked=[0,0]", "data.num_disliked=[0,0]"], "a history needs an image"),
        (["data.empty_side_rate=2"], "between 0 and 1"),
        (["questions.likes=2"], "must be 0 or 1"),
        (
            ["questions.like=0", "questions.choose=0", "questions.likes=0", "questions.dislikes=0"],
            "nothing would be asked",
        ),
        (["model.lora_targets=[]"], "nothing would train"),
    ],
)
def test_bad_configuration_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        build_config(VQAConfig, where="for stage 'vqa'", file=None, overrides=words)
