"""Stage inject end to end on the tiny pipeline: what trains, what is kept, what is drawn, what is refused."""

import json
from itertools import chain, islice, repeat

import numpy as np
import pytest
import torch
from safetensors import safe_open

from prefgen.errors import CheckpointError
from prefgen.models.user_adapter import KIND, load_user_adapter
from prefgen.run import fit
from prefgen.run_noise import quiet_lightning
from prefgen.stages.inject.data import InjectData
from prefgen.stages.inject.module import InjectModule
from prefgen.testing.resume import assert_resume_is_exact


def run_fit(config):
    modules = []

    def make_module():
        modules.append(InjectModule(config))
        return modules[-1]

    with quiet_lightning():
        fit(config, make_module=make_module, make_data=lambda: InjectData(config))
    return modules[-1]


def training_batches(config, module, count):
    loader = InjectData(config, image_size=module.bundle.image_size).train_dataloader()
    return list(islice(chain.from_iterable(repeat(loader)), count))


@pytest.mark.parametrize(
    ("num_workers", "cache"), [(0, "true"), pytest.param(2, "true", marks=pytest.mark.slow), (2, "false")]
)
def test_a_resumed_run_is_the_run_never_stopped(make_config, tmp_path, num_workers, cache):
    """14 training users in batches of 4: three batches an epoch, so step 4 of 6 lies inside the second."""
    config = make_config(
        "trainer.limit_val_batches=0", f"data.cache_latents={cache}", f"data.cache_text={cache}"
    )
    report = assert_resume_is_exact(
        config,
        make_module=InjectModule,
        make_data=InjectData,
        tmp_path=tmp_path,
        num_workers=num_workers,
        stop=4,
    )
    assert len(set(report.straight_batches)) == 6


def test_fit_writes_a_small_artefact_that_loads(make_config, tmp_path):
    config = make_config(
        "trainer.max_steps=3", "optim.ema_decay=0.5", "inject.sample_every_n_steps=1", "data.max_eval_users=6"
    )
    module = run_fit(config)
    run_dir = tmp_path / "run"
    trained = sum(p.numel() for p in module.trained_parameters())
    assert trained == sum(module.adapter.num_parameters().values())
    artefact = run_dir / "user_adapter.safetensors"
    stored = 4 * (trained + 2 * 38)
    assert stored < artefact.stat().st_size < stored + 4096, "trained parts, statistics and a header only"
    loaded = load_user_adapter(artefact, unet=module.bundle.unet)
    for name, value in module.adapter.state_dict().items():
        assert torch.equal(loaded.adapter.state_dict()[name], value), name
    assert set(loaded.lineage) >= {"mllm", "unet", "projector"}
    with safe_open(artefact, framework="pt") as file:
        assert not any("unet" in name or "vae" in name for name in file.keys())  # noqa: SIM118
    checkpoint = torch.load(run_dir / "checkpoints" / "step-00000003.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"adapter"}
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert "val/loss_other" in json.dumps(metrics)
    grids = sorted((run_dir / "samples").glob("*.png"))
    assert grids
    from PIL import Image

    with Image.open(grids[-1]) as grid:
        assert grid.width == 16 * 4, "base and three users wide"
        assert grid.height in (16 * 2, 16 * 3, 16 * 4, 16 * 5), "liked pictures, then a row a prompt"


def test_what_is_measured_before_training_is_what_training_starts_from(make_config, tmp_path):
    settings = ("trainer.max_steps=1", "optim.learning_rate=1e-12", "data.max_eval_users=4")
    run_fit(make_config(*settings, "trainer.validate_before_fit=true", "trainer.val_check_interval=1"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for name in ("val/loss", "val/loss_other"):
        assert metrics["before"][name] == pytest.approx(metrics["fit"][name], rel=1e-5)
    assert metrics["before"]["val/loss"] != metrics["before"]["val/loss_base"]


def test_mixed_precision_over_a_bfloat16_base(make_config, tmp_path):
    """As the mini preset trains: the adapter stays float32, and its steps are not rounded away."""
    config = make_config(
        "trainer.precision=bf16-mixed",
        "model.frozen_dtype=bfloat16",
        "model.memory_format=channels_last",
        "trainer.max_steps=3",
        "inject.sample_every_n_steps=1",
        "optim.learning_rate=1e-4",
        "data.max_eval_users=6",
    )
    module = run_fit(config)
    assert module.bundle.unet.dtype == torch.bfloat16
    assert module.bundle.vae.dtype == torch.float32
    assert {p.dtype for p in module.trained_parameters()} == {torch.float32}
    fresh = InjectModule(config)
    for branch, start in zip(
        module.adapter.attention.branches, fresh.adapter.attention.branches, strict=True
    ):
        assert not torch.equal(branch.to_v_user.weight, start.to_v_user.weight)
    assert list((tmp_path / "run" / "samples").glob("*.png"))


def test_the_first_column_of_the_grid_is_the_base_model(make_config):
    from prefgen.models.pixels import to_uint8
    from prefgen.models.sampling import sample
    from prefgen.stages.inject.module import _SAMPLE_SEED

    config = make_config("inject.num_sample_prompts=1")
    module = InjectModule(config)
    batch = training_batches(config, module, 1)[0]
    grid = module.draw_grid(batch)
    prompt = next(p for p in batch.prompts if p)
    how = {"num_steps": 2, "guidance_scale": config.inject.sample_guidance}
    base = to_uint8(sample(module.bundle, [prompt] * 4, seeds=[_SAMPLE_SEED] * 4, **how))[0]
    assert np.array_equal(grid[16:32, :16], base)
    assert not np.array_equal(grid[16:32, 16:32], base)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        pytest.param(("inject.min_snr_gamma=5", "model.gradient_checkpointing=true"), marks=pytest.mark.slow),
    ],
)
def test_users_come_to_change_the_prediction(make_config, overrides):
    """On one batch over and over the loss falls, the own user helps, and nothing frozen moves."""
    config = make_config(
        "inject.part_drop_rate=0", "inject.user_drop_rate=0", "inject.both_drop_rate=0", *overrides
    )
    module = InjectModule(config)
    module.log = lambda *args, **kwargs: None
    frozen = {n: v.clone() for n, v in module.state_dict().items() if not n.startswith("adapter.")}
    batch = training_batches(config, module, 1)[0]
    optimizer = torch.optim.AdamW(module.trained_parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module.training_step(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        noised, tokens = module._noised(batch), module._tokens(batch)
        own = float(module._losses(noised, users=tokens).mean())
        other = float(module._losses(noised, users=tokens.roll(1, dims=0)).mean())
        base = float(module._losses(noised, users=None).mean())
    assert losses[-1] < losses[0]
    assert own < base, "users must be worth something after 60 steps on them"
    assert own < other, "the own user must be worth more than another"
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_training_starts_from_aligned_embeddings_as_text(make_config, tmp_path):
    """Once, however often the module is set up; and from a random Linear where that is asked for."""
    weights = {}
    for start in ("text", "random"):
        config = make_config(
            f"run_dir={tmp_path / start}",
            f"model.aligned_start={start}",
            "trainer.validate_before_fit=true",
            "trainer.max_steps=1",
            "optim.learning_rate=1e-9",
        )
        module = run_fit(config)
        assert module.projector.shape.text_width == module.bundle.cross_width
        fusion = module.adapter.fusion
        span = dict(fusion.shape.spans())["aligned"]
        weights[start] = fusion.proj.weight[:, span].detach(), torch.diag(fusion.scale[span]).repeat(4, 1)
    (text, back), (random, _) = weights["text"], weights["random"]
    torch.testing.assert_close(text - random, back, atol=1e-5, rtol=0)


def test_timesteps_may_be_the_noisiest_of_several_draws(make_config):
    found = []
    for draws in (1, 2):
        config = make_config(f"inject.timestep_draws={draws}")
        module = InjectModule(config)
        seen = []
        module._losses = lambda noised, users, seen=seen: seen.append(noised.timesteps) or torch.zeros(1)
        module.log = lambda *args, **kwargs: None
        batch = training_batches(config, module, 1)[0]
        module.training_step(batch)
        found.append(seen[0])
        assert torch.equal(module._noised(batch).timesteps, (batch.times * 1000).long())
    share = batch.times
    assert torch.equal(found[0], (share * 1000).long())
    assert torch.equal(found[1], (share.sqrt() * 1000).long())


def test_kept_latents_and_texts_give_the_loss_of_fresh_ones(make_config):
    losses = []
    for keep in ("true", "false"):
        config = make_config(f"data.cache_latents={keep}", f"data.cache_text={keep}")
        module = InjectModule(config)
        batch = training_batches(config, module, 1)[0]
        with torch.no_grad():
            for _ in range(2):
                losses.append(module._losses(module._noised(batch), users=module._tokens(batch)))
    first_kept, kept, fresh, again = losses
    assert torch.equal(first_kept, kept)
    assert torch.equal(fresh, again)
    # Encoding alone and in a batch rounds differently; measured 6e-8.
    torch.testing.assert_close(kept, fresh, rtol=0, atol=1e-5)


def test_image_only_has_as_many_tokens(make_config, workdir):
    ours = InjectModule(make_config())
    image_only = InjectModule(
        make_config("model.parts=[image,image,image]", "model.projector=nothing/there.safetensors")
    )
    assert image_only.projector is None
    assert image_only.adapter.fusion.shape.num_user_tokens == ours.adapter.fusion.shape.num_user_tokens
    assert image_only.adapter.num_parameters()["attention"] == ours.adapter.num_parameters()["attention"]
    batch = training_batches(make_config(), image_only, 1)[0]
    assert image_only._tokens(batch).shape == (4, 12, 16)


def test_a_projector_of_other_embeddings_is_refused(make_config, tmp_path):
    from prefgen.models.projector import ProjectorShape, SemProjector, save_projector

    path = tmp_path / "projector.safetensors"
    projector = SemProjector(ProjectorShape(sem_width=6, text_width=16, hidden_width=8))
    save_projector(projector, path=path, lineage={"mllm": "another"}, text={})
    with pytest.raises(CheckpointError, match="mllm is 'tiny' but 'another' is expected"):
        InjectModule(make_config(f"model.projector={path}"))
    save_projector(projector, path=path, lineage={"text_encoder": "another"}, text={})
    with pytest.raises(CheckpointError, match="text space of another pipeline"):
        InjectModule(make_config(f"model.projector={path}"))


def test_embeddings_of_another_image_encoder_are_refused(make_config, tmp_path):
    from prefgen.testing.data import make_embeddings

    embeddings = make_embeddings(
        tmp_path / "e", image_dim=12, header={"mllm": "tiny", "image_encoder": "another"}
    )
    with pytest.raises(CheckpointError, match="image_encoder is 'another'"):
        InjectModule(make_config("model.parts=[image]", f"data.embeddings={embeddings}"))


def test_the_initial_weights_depend_on_the_seed_alone(make_config):
    torch.manual_seed(1)
    first = InjectModule(make_config())
    torch.manual_seed(2)
    second = InjectModule(make_config())
    other = InjectModule(make_config("seed=5"))
    assert torch.equal(first.adapter.fusion.proj.weight, second.adapter.fusion.proj.weight)
    assert not torch.equal(first.adapter.fusion.proj.weight, other.adapter.fusion.proj.weight)


def test_training_starts_from_an_ip_adapter(make_config, workdir, tmp_path):
    """With the image alone the start is the IP-Adapter itself, statistics and all, and a resume keeps it."""
    import stock_ip_adapter

    path = tmp_path / "theirs.safetensors"
    stock_ip_adapter.make(
        workdir / "pipeline",
        path,
        image_width=12,
        prompts=["a fox"],
        seeds=[1],
        steps=1,
        guidance_scale=3.0,
        scale=1.0,
    )
    config = make_config(
        f"model.init_adapter={path}", "model.parts=[image]", "trainer.max_steps=1", "optim.learning_rate=0"
    )
    module = run_fit(config)
    with safe_open(path, framework="pt") as file:
        expected = file.get_tensor("ip_adapter.1.to_k_ip.weight")
        weight = file.get_tensor("image_proj.proj.weight")
    assert torch.equal(module.adapter.attention.branches[0].to_k_user.weight, expected)
    assert torch.equal(module.adapter.fusion.proj.weight, weight)
    assert not bool(module.adapter.fusion.mean.any())
    assert "init_adapter" in module.lineage
    three = make_config(f"model.init_adapter={path}", "trainer.max_steps=1", f"run_dir={tmp_path / 'three'}")
    assert [i.key for i in three.required_inputs()][-1] == "model.init_adapter"
    module = run_fit(three)
    spans = dict(module.adapter.fusion.shape.spans())
    assert bool(module.adapter.fusion.mean[spans["core"]].any())
    assert not bool(module.adapter.fusion.mean[spans["image"]].any())


def test_an_adapter_of_another_unet_of_this_size_is_told(make_config, tmp_path, caplog):
    words = ["trainer.max_steps=1", "optim.learning_rate=0"]
    run_fit(make_config(*words, f"run_dir={tmp_path / 'first'}"))
    path = tmp_path / "first" / "user_adapter.safetensors"
    InjectModule(make_config(f"model.init_adapter={path}"))
    assert not caplog.records
    header, tensors = KIND.read(path)
    header = {name: header[name] for name in ("shape", "layers", "lineage")}
    KIND.write(path, tensors=tensors, header={**header, "lineage": {**header["lineage"], "unet": "0"}})
    InjectModule(make_config(f"model.init_adapter={path}"))
    assert "was trained for another UNet of the same layers" in caplog.text


def test_sdxl_trains_through_the_same_bundle(make_config, tmp_path):
    """Two text encoders, pooled text, time ids, a float32 VAE beside a bfloat16 UNet, a size of its own."""
    from prefgen.testing.diffusion import save_tiny_sdxl

    config = make_config(
        f"model.pipeline={save_tiny_sdxl(tmp_path / 'xl')}",
        "model.frozen_dtype=bfloat16",
        "trainer.precision=bf16-mixed",
        "trainer.max_steps=3",
        "data.image_size=24",
        "data.max_eval_users=4",
        "inject.sample_every_n_steps=1",
        "inject.text_drop_rate=0.5",
    )
    module = run_fit(config)
    bundle = module.bundle
    assert bundle.cross_width == 32
    assert bundle.zero_empty_text
    assert bundle.latent_shape == (4, 12, 12)
    assert (bundle.vae.dtype, bundle.unet.dtype) == (torch.float32, torch.bfloat16)
    batch = training_batches(config, module, 1)[0]
    assert batch.pixels.shape[-2:] == (24, 24)
    noised = module._noised(batch)
    empty = torch.tensor([not prompt for prompt in batch.prompts])
    assert not bool(noised.text.hidden[empty].any()), "SDXL's base was trained with zeros for no prompt"
    ids = bundle._added(noised.text, latents=noised.latents)["time_ids"]
    assert ids[0].tolist() == [24, 24, 0, 0, 24, 24]
    assert list((tmp_path / "run" / "samples").glob("*.png"))
