"""One training step of Stable Diffusion 1.5 in real size, weights random, on the CPU (slow, 6 GB)."""

import pytest
import torch

from prefgen.models.projector import ProjectorShape, SemProjector, save_projector
from prefgen.run import fit
from prefgen.run_noise import quiet_lightning
from prefgen.stages.inject.data import InjectData
from prefgen.stages.inject.module import InjectModule
from prefgen.testing.data import make_embeddings, make_shards
from prefgen.testing.published import SD15, save_random_sd15


@pytest.mark.slow
def test_sd15_takes_a_training_step(make_config, tmp_path):
    save_random_sd15(tmp_path / "pipeline")
    make_shards(tmp_path, num_users=8, num_liked=8, num_disliked=6)
    make_embeddings(
        tmp_path / "embeddings",
        num_users=8,
        num_images=8,
        core_dim=64,
        sem_dim=32,
        image_dim=SD15.image_width,
    )
    projector = SemProjector(ProjectorShape(sem_width=32, text_width=768, hidden_width=16))
    save_projector(projector, path=tmp_path / "align" / "projector.safetensors", lineage={}, text={})
    config = make_config(
        f"workdir={tmp_path}",
        f"run_dir={tmp_path / 'run'}",
        f"model.pipeline={tmp_path / 'pipeline'}",
        "model.frozen_dtype=bfloat16",
        "model.gradient_checkpointing=true",
        "trainer.precision=bf16-mixed",
        "trainer.max_steps=1",
        "trainer.limit_val_batches=0",
        "optim.learning_rate=1e-3",
        "data.batch_size=1",
        "data.image_size=128",
    )
    modules = []

    def make_module():
        modules.append(InjectModule(config))
        return modules[-1]

    with quiet_lightning():
        fit(config, make_module=make_module, make_data=lambda: InjectData(config))
    adapter = modules[0].adapter
    assert len(adapter.attention.names) == 16
    assert adapter.num_parameters()["attention"] == 19_169_280
    frozen = dict(modules[0].bundle.unet.named_modules())
    for name, branch in zip(adapter.attention.names, adapter.attention.branches, strict=True):
        start = frozen[name.removesuffix(".processor")].to_v.weight
        assert not torch.equal(branch.to_v_user.weight, start.float()), f"{name} did not train"
    assert (tmp_path / "run" / "user_adapter.safetensors").stat().st_size > 4 * 19_169_280
