"""Settings under which each of the four stages trains in seconds on a tiny workdir."""

from __future__ import annotations

from pathlib import Path

STAGE_ARTEFACTS = {
    "vqa": "lora/adapter_model.safetensors",
    "probe": "probe.json",
    "align": "projector.safetensors",
    "inject": "user_adapter.safetensors",
}
"""What each stage writes into its run folder."""


def tiny_settings(stage: str, *, workdir: Path) -> dict[str, str]:
    """Configuration keys of one stage for a folder of :func:`prefgen.testing.study.save_tiny_workdir`.

    Steps, run folder and intervals are the caller's to choose.
    """
    models = workdir / "models"
    common = {
        "workdir": workdir,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.validate_before_fit": "false",
    }
    own = {
        "vqa": {
            "model.mllm": models / "mllm",
            "model.lora_rank": 2,
            "data.batch_size": 4,
            "data.num_liked": "[1,4]",
            "data.num_disliked": "[1,4]",
            "data.eval_references": 3,
            "data.eval_queries": 4,
            "questions.num_listed_users": 1,
        },
        "probe": {
            "model.mllm": models / "mllm",
            "model.image_encoder": models / "pipeline" / "image_encoder",
            "data.batch_size": 16,
            "data.inter_train_draws": 6,
            "data.inter_test_draws": 4,
            "data.inter_references": 3,
            "data.intra_references": 4,
            "probe.num_resamples": 50,
        },
        "align": {
            "model.pipeline": models / "pipeline",
            "model.hidden_width": 16,
            "data.batch_size": 8,
            "data.orders_per_user": 2,
            "align.group_size": 4,
        },
        "inject": {
            "model.pipeline": models / "pipeline",
            "model.memory_format": "contiguous",
            "model.init_adapter": "null",  # the preset's was made for the mini pipeline
            "data.batch_size": 4,
            "inject.sample_every_n_steps": 0,
        },
    }[stage]
    return {key: str(value) for key, value in (common | own).items()}
