import pytest

from prefgen.config import load_config
from prefgen.testing.data import make_embeddings
from prefgen.testing.diffusion import save_tiny_pipeline


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Embedding shards of 40 users (20 of them for training) and a pipeline folder."""
    folder = tmp_path_factory.mktemp("align")
    header = {"mllm": "aa", "lora": "bb", "probe": "cc", "image_encoder": "dd"}
    make_embeddings(folder / "embeddings", num_users=40, header=header)
    save_tiny_pipeline(folder / "pipeline")
    return folder


@pytest.fixture
def make_config(inputs, tmp_path):
    def make(*overrides, run_dir="run"):
        settings = {
            "workdir": inputs,
            "run_dir": tmp_path / run_dir,
            "model.pipeline": inputs / "pipeline",
            "model.hidden_width": 16,
            "data.batch_size": 8,
            "data.orders_per_user": 2,
            "align.group_size": 4,
            "trainer.accelerator": "cpu",
            "trainer.precision": "32-true",
            "trainer.validate_before_fit": "false",
            "trainer.max_steps": 6,
            "trainer.val_check_interval": 3,
            "trainer.log_every_n_steps": 1,
            "optim.warmup_steps": 1,
            "checkpoint.every_n_steps": 3,
        }
        settings.update(override.split("=", 1) for override in overrides)
        return load_config("align", overrides=[f"{key}={value}" for key, value in settings.items()])

    return make
