import pytest

from prefgen.config import load_config
from prefgen.models.lora import add_lora, save_lora
from prefgen.models.mllm import MLLM
from prefgen.testing.data import make_shards
from prefgen.testing.diffusion import save_tiny_pipeline
from prefgen.testing.mllm import tiny_mllm


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Shards of 24 users (12 for training, 6 of validation), a tiny MLLM, a LoRA and a pipeline."""
    folder = tmp_path_factory.mktemp("probe")
    make_shards(folder, num_users=24, num_liked=9, num_disliked=8)
    tiny_mllm(folder / "mllm", texts=("red yellow green cyan blue magenta",))
    save_lora(add_lora(MLLM.load(folder / "mllm"), rank=2), path=folder / "lora")
    save_tiny_pipeline(folder / "pipeline")
    return folder


@pytest.fixture(scope="session")
def probe_config(inputs):
    def make(run_dir, *overrides):
        settings = {
            "workdir": inputs,
            "run_dir": run_dir,
            "model.mllm": inputs / "mllm",
            "model.lora": inputs / "lora",
            "model.image_encoder": inputs / "pipeline" / "image_encoder",
            "data.batch_size": 32,
            "data.inter_train_draws": 6,
            "data.inter_test_draws": 4,
            "data.inter_references": 3,
            "data.intra_references": 4,
            "embed.out": f"{run_dir}-embeddings",
            "embed.num_draws": 3,
            "embed.sparse_share": 0.4,
            "embed.num_references": 4,
            "trainer.accelerator": "cpu",
            "trainer.precision": "32-true",
            "trainer.max_steps": 6,
            "trainer.val_check_interval": 3,
            "trainer.log_every_n_steps": 1,
            "checkpoint.every_n_steps": 3,
            "probe.num_resamples": 50,
        }
        settings.update(override.split("=", 1) for override in overrides)
        return load_config("probe", overrides=[f"{key}={value}" for key, value in settings.items()])

    return make
