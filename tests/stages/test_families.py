"""Stages vqa and probe with a tiny model of every family, by the settings a user would write."""

import json

import pytest
import torch

from prefgen.config import build_config, load_config
from prefgen.errors import ConfigError
from prefgen.lineage import hash_folder
from prefgen.models.calibration import Calibration
from prefgen.models.families import FAMILY_NAMES
from prefgen.run import fit, run_stage
from prefgen.run_noise import quiet_lightning
from prefgen.stages.vqa.config import VQAConfig
from prefgen.stages.vqa.data import VQAData
from prefgen.stages.vqa.module import VQAModule
from prefgen.testing.data import make_shards
from prefgen.testing.families import tiny_family_mllm


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), num_users=16, num_liked=5, num_disliked=5)


def config(stage, *, work, shards, family, **more):
    settings = {
        "workdir": work,
        "data.shards": shards,
        "model.mllm": work / "mllm",
        "model.family": family,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.validate_before_fit": "false",
        "trainer.max_steps": 2,
        "trainer.log_every_n_steps": 1,
        "checkpoint.every_n_steps": 2,
        **more,
    }
    return load_config(stage, overrides=[f"{key}={value}" for key, value in settings.items()])


VQA = {
    "model.lora_rank": 2,
    "data.batch_size": 4,
    "data.num_liked": "[1,3]",
    "data.num_disliked": "[0,3]",
    "data.eval_references": 2,
    "data.eval_queries": 2,
    "questions.num_listed_users": 0,
    "trainer.val_check_interval": 2,
    "trainer.limit_val_batches": 1,
}
PROBE = {
    "model.image_encoder": "none",
    "data.batch_size": 16,
    "data.inter_train_draws": 2,
    "data.inter_test_draws": 2,
    "data.inter_references": 2,
    "data.intra_references": 2,
    "data.intra_queries": 2,
    "probe.num_resamples": 10,
}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_vqa_and_probe(tmp_path, shards, family):
    tiny_family_mllm(tmp_path / "mllm", family=family, texts=("red yellow green cyan blue magenta",))
    where = {"work": tmp_path, "shards": shards, "family": family}
    result = run_stage(config("vqa", **where, **VQA), verb="fit", stage="vqa")
    assert 0 <= result.metrics["val/accuracy_like"] <= 1
    assert (tmp_path / "vqa" / "lora" / "adapter_model.safetensors").is_file()
    run_stage(config("probe", **where, **PROBE), verb="fit", stage="probe")
    report = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert len(report["tasks"]["inter"]["cells"]) == 4 * 4


def trained_module(settings):
    made = []

    def module():
        made.append(VQAModule(settings))
        return made[0]

    with quiet_lightning():
        result = fit(settings, make_module=module, make_data=lambda: VQAData(settings))
    return made[0], result


@pytest.mark.slow
def test_gradient_checkpointing_and_low_precision_weights_train(tmp_path, shards):
    tiny_family_mllm(tmp_path / "mllm", family="qwen2_5_vl")
    where = {"work": tmp_path, "shards": shards, "family": "auto"}
    rates = {**VQA, "optim.learning_rate": 1e-2}
    weights = {}
    for name, more in (
        ("plain", {}),
        ("checkpointed", {"model.gradient_checkpointing": "true"}),
        ("bf16", {"model.frozen_dtype": "bfloat16", "trainer.precision": "bf16-mixed"}),
    ):
        module, _ = trained_module(config("vqa", **where, **{**rates, **more, "run_dir": tmp_path / name}))
        weights[name] = torch.cat([p.detach().float().flatten() for p in module.trained_parameters()])
        assert module.mllm.text_model.embed_tokens.weight.dtype == (
            torch.bfloat16 if name == "bf16" else torch.float32
        )
    torch.testing.assert_close(weights["checkpointed"], weights["plain"])
    assert torch.isfinite(weights["bf16"]).all()
    assert not torch.equal(weights["bf16"], weights["plain"])


def test_score_questions_and_the_contrastive_term_train(tmp_path, shards):
    tiny_family_mllm(tmp_path / "mllm", family="idefics2", texts=("Score for this image? + -",))
    more = {"questions.score": 2, "questions.contrastive_weight": 0.5}
    settings = config("vqa", work=tmp_path, shards=shards, family="idefics2", **VQA, **more)
    module, result = trained_module(settings)
    assert {"train/loss_contrast", "train/loss_score", "val/accuracy_score"} <= result.metrics.keys()
    assert result.metrics["train/loss_contrast"] > 0


def test_a_test_run_reports_references_groups_and_calibration(tmp_path, shards):
    tiny_family_mllm(tmp_path / "mllm", family="idefics2")
    settings = config("vqa", work=tmp_path, shards=shards, family="idefics2", **VQA)
    trained_module(settings)
    metrics = run_stage(settings, verb="test", stage="vqa").metrics
    assert {"test/accuracy_like_at_1", "test/accuracy_like_at_4", "test/calibration_error"} <= metrics.keys()
    assert "test/accuracy_like_at_8" not in metrics, "histories have five images a side"
    report = json.loads((tmp_path / "vqa" / "test.json").read_text())
    assert set(report["by_references"]) == {"1", "2", "4"}
    assert set(report["by_group"]) == {"other"}
    for kind in ("raw", "calibrated"):
        error = report["calibration_error"][kind]
        assert 0 <= error["low"] <= error["mean"] <= error["high"] <= 1
        assert error["mean"] == pytest.approx(report["reliability"][kind]["error"])
    lora = hash_folder(tmp_path / "vqa" / "lora")
    assert Calibration.load(tmp_path / "vqa" / "calibration.json", lora=lora).lora == lora
    for name in ("references.png", "reliability.png", "calibration.json"):
        assert (tmp_path / "vqa" / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.family=idefics9"], "model.family"),
        (["model.attention=flash_attention_2"], "set model.frozen_dtype=bfloat16"),
        (
            [
                "model.attention=flash_attention_2",
                "model.frozen_dtype=bfloat16",
                "model.gradient_checkpointing=true",
            ],
            "use model.attention=sdpa",
        ),
        (["model.quantization=nf4", "trainer.precision=bf16-true"], "use trainer.precision=bf16-mixed"),
        (["questions.contrastive_weight=1", "questions.like=1"], "questions.like=1 to 2 or more"),
        (["data.max_batch_tokens=-1"], "data.max_batch_tokens=-1 must be at least 0"),
        (["data.reference_counts=[0,2]"], "data.reference_counts=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        build_config(VQAConfig, where="for stage 'vqa'", file=None, overrides=words)
