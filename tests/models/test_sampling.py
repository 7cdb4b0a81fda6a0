"""Sampling: the stock pipeline's images with nobody, one's own with users, whatever the batch."""

from dataclasses import replace

import pytest
import torch

from prefgen.errors import DataError
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import FusionShape
from prefgen.models.pixels import to_uint8
from prefgen.models.sampling import SampleUsers, noise_for, sample
from prefgen.models.user_adapter import UserAdapter

SHAPE = FusionShape(parts=("aligned", "core", "image"), widths=(16, 10, 12), cross_width=16)
PROMPTS = ["a red fox", "a blue boat", "a green tree"]
SEEDS = [3, 4, 5]
HOW = {"num_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def stock(tiny_pipeline):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def bundle(tiny_pipeline):
    return DiffusionBundle.load(str(tiny_pipeline))


def make_users(bundle, *, scale):
    torch.manual_seed(0)
    adapter = UserAdapter(bundle.unet, shape=SHAPE)
    adapter.attention.install()
    generator = torch.Generator().manual_seed(1)
    parts = {
        name: torch.randn(3, width, generator=generator)
        for name, width in zip(SHAPE.parts, SHAPE.widths, strict=True)
    }
    return SampleUsers.of(adapter, parts=parts, scale=scale)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("scale", [None, 0.0])
def test_without_users_the_stock_pipelines_images_bit_for_bit(bundle, stock, guidance_scale, scale):
    users = None if scale is None else make_users(bundle, scale=scale)
    ours = sample(bundle, PROMPTS, seeds=SEEDS, users=users, num_steps=4, guidance_scale=guidance_scale)
    theirs = stock(
        PROMPTS,
        latents=noise_for(SEEDS, bundle=bundle),
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        output_type="np",
    ).images
    assert (to_uint8(ours) == (theirs * 255).round().astype("uint8")).all()
    unit = (ours * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert torch.equal(unit, torch.from_numpy(theirs))


def test_noise_of_a_seed_is_the_stock_pipelines(bundle, stock):
    ours = sample(bundle, PROMPTS, seeds=SEEDS, **HOW)
    theirs = stock(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    assert torch.equal((ours * 0.5 + 0.5).clamp(0, 1), theirs)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers' Euler on numpy 2
@pytest.mark.parametrize(
    "kind", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler"]
)
def test_other_schedulers_follow_the_stock_loop_too(bundle, stock, kind):
    import diffusers

    scheduler = getattr(diffusers, kind).from_config(bundle.scheduler.config)
    own = stock.scheduler
    bundle = replace(bundle, scheduler=scheduler)
    stock.scheduler = type(scheduler).from_config(scheduler.config)
    try:
        theirs = stock(
            PROMPTS,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="pt",
        ).images
    finally:
        stock.scheduler = own
    assert torch.equal((sample(bundle, PROMPTS, seeds=SEEDS, **HOW) * 0.5 + 0.5).clamp(0, 1), theirs)


def test_scales_alternate_within_a_batch(bundle):
    base = sample(bundle, PROMPTS, seeds=SEEDS, **HOW)
    users = make_users(bundle, scale=1.0)
    all_on = sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW)
    users = replace(users, scale=[1.0, 0.0, 1.0])
    mixed = sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW)
    assert torch.equal(mixed[1], base[1])
    assert torch.equal(mixed[0], all_on[0])
    assert not torch.equal(all_on[0], base[0])
    after = sample(bundle, PROMPTS, seeds=SEEDS, **HOW)
    assert torch.equal(after, base), "users must not outlive their images"


def test_images_do_not_depend_on_the_batch_size(bundle):
    users = make_users(bundle, scale=[1.0, 0.0, 0.5])
    together = sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW)
    singly = sample(bundle, PROMPTS, seeds=SEEDS, users=users, batch_size=1, **HOW)
    # Products of other batch sizes round differently; measured 1.6e-6 after 4 steps.
    torch.testing.assert_close(singly, together, rtol=0, atol=1e-4)


def test_the_unconditional_branch_takes_the_null_tokens(bundle):
    users = make_users(bundle, scale=1.0)
    steered = replace(users, null_embeds=users.embeds.flip(0))
    plain = sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW)
    assert not torch.equal(plain, sample(bundle, PROMPTS, seeds=SEEDS, users=steered, **HOW))
    unguided = {"num_steps": 4, "guidance_scale": 1.0}
    assert torch.equal(
        sample(bundle, PROMPTS, seeds=SEEDS, users=users, **unguided),
        sample(bundle, PROMPTS, seeds=SEEDS, users=steered, **unguided),
    )


def test_unequal_counts_are_refused(bundle):
    with pytest.raises(DataError, match="one of each per image"):
        sample(bundle, PROMPTS, seeds=[1], **HOW)


@pytest.mark.parametrize("negative", [None, "dark"])
def test_an_sdxl_folder_draws_the_stock_pipelines_images(tmp_path, negative):
    from diffusers import StableDiffusionXLPipeline

    from prefgen.testing.diffusion import save_tiny_sdxl

    path = save_tiny_sdxl(tmp_path / "xl")
    stock = StableDiffusionXLPipeline.from_pretrained(path, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    bundle = DiffusionBundle.load(str(path))
    negatives = None if negative is None else [negative] * 3
    theirs = stock(
        PROMPTS,
        latents=noise_for(SEEDS, bundle=bundle),
        negative_prompt=negatives,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    shape = FusionShape(parts=("core",), widths=(10,), cross_width=bundle.cross_width)
    adapter = UserAdapter(bundle.unet, shape=shape)
    adapter.attention.install()
    users = SampleUsers.of(adapter, parts={"core": torch.ones(3, 10)}, scale=0.0)
    ours = sample(bundle, PROMPTS, seeds=SEEDS, users=users, negative_prompts=negatives, **HOW)
    assert torch.equal((ours * 0.5 + 0.5).clamp(0, 1), theirs)
    steered = sample(bundle, PROMPTS, seeds=SEEDS, users=replace(users, scale=1.0), **HOW)
    assert not torch.equal(steered, ours)
