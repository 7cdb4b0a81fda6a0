"""A workdir with everything stage inject reads, tiny: shards, embeddings, projector, pipeline."""

import pytest


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    import torch

    from prefgen.models.projector import ProjectorShape, SemProjector, save_projector
    from prefgen.testing.data import make_embeddings, make_shards
    from prefgen.testing.diffusion import TINY_IMAGE_DIM, TINY_TEXT_DIM, save_tiny_pipeline

    folder = tmp_path_factory.mktemp("inject")
    make_shards(folder, num_users=28, num_liked=8, num_disliked=6)
    make_embeddings(
        folder / "embeddings", num_users=28, num_images=8, core_dim=10, sem_dim=6, image_dim=TINY_IMAGE_DIM
    )
    save_tiny_pipeline(folder / "pipeline")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        projector = SemProjector(ProjectorShape(sem_width=6, text_width=TINY_TEXT_DIM, hidden_width=8))
    save_projector(
        projector, path=folder / "align" / "projector.safetensors", lineage={"mllm": "tiny"}, text={}
    )
    return folder


@pytest.fixture
def make_config(workdir, tmp_path):
    from prefgen.config import build_config
    from prefgen.stages.inject.config import InjectConfig

    def make(*overrides):
        settings = {
            "workdir": str(workdir),
            "run_dir": str(tmp_path / "run"),
            "model.pipeline": str(workdir / "pipeline"),
            "trainer.precision": "32-true",
            "trainer.accelerator": "cpu",
            "trainer.log_every_n_steps": "1",
            "data.batch_size": "4",
            "optim.learning_rate": "1e-3",
            "inject.sample_every_n_steps": "0",
            "inject.sample_steps": "2",
            "model.memory_format": "contiguous",
        }
        settings |= dict(override.split("=", 1) for override in overrides)
        return build_config(
            InjectConfig, where="here", file=None, overrides=[f"{k}={v}" for k, v in settings.items()]
        )

    return make
