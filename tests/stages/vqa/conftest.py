import pytest

from prefgen.config import load_config
from prefgen.testing.data import make_shards
from prefgen.testing.mllm import tiny_mllm


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Shards of 32 users (16 of them for training) and a tiny MLLM."""
    folder = tmp_path_factory.mktemp("vqa")
    make_shards(folder, num_users=32, num_liked=7, num_disliked=6)
    tiny_mllm(folder / "mllm", texts=("red yellow green cyan blue magenta",))
    return folder


@pytest.fixture
def make_config(inputs, tmp_path):
    def make(*overrides, run_dir="run"):
        settings = {
            "workdir": inputs,
            "run_dir": tmp_path / run_dir,
            "model.mllm": inputs / "mllm",
            "model.lora_rank": 2,
            "data.batch_size": 4,
            "data.num_liked": "[1,4]",
            "data.num_disliked": "[1,4]",
            "data.eval_references": 3,
            "data.eval_queries": 4,
            "questions.num_listed_users": 0,
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
        return load_config("vqa", overrides=[f"{key}={value}" for key, value in settings.items()])

    return make
