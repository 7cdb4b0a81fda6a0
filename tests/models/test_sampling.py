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
from prefgen.models.user_schedule import CONSTANT, UserSchedule

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


def steer(bundle, *, negative_scale, scale=1.0):
    """Users whose negative twins have other parts, and those twins as users of their own."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    torch.manual_seed(0)
    bundle.unet.set_attn_processor(AttnProcessor2_0())  # without the users of an earlier call
    adapter = UserAdapter(bundle.unet, shape=SHAPE)
    adapter.attention.install()
    generator = torch.Generator().manual_seed(1)
    sides = [
        {
            name: torch.randn(3, width, generator=generator)
            for name, width in zip(SHAPE.parts, SHAPE.widths, strict=True)
        }
        for _ in range(2)
    ]
    return SampleUsers.of(
        adapter, parts=sides[0], scale=scale, negative_parts=sides[1], negative_scale=negative_scale
    )


def test_a_negative_user_scale_of_0_is_as_before_bit_for_bit(bundle):
    before = sample(bundle, PROMPTS, seeds=SEEDS, users=make_users(bundle, scale=1.0), **HOW)
    users = steer(bundle, negative_scale=0.0)
    assert users.null_scale is None
    assert torch.equal(sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW), before)


def test_the_negative_twins_steer_the_unconditional_rows_at_their_own_scale(bundle):
    plain = sample(bundle, PROMPTS, seeds=SEEDS, users=steer(bundle, negative_scale=0.0), **HOW)
    drawn = {}
    for negative in (0.5, 1.0):
        users = steer(bundle, negative_scale=negative)
        drawn[negative] = sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW)
        assert not torch.equal(drawn[negative], plain)
    assert not torch.equal(drawn[0.5], drawn[1.0])
    users = steer(bundle, negative_scale=0.5)
    users.activate(guided=True)
    scale = users.attention._users.scale.flatten().tolist()
    assert scale == [0.5] * 3 + [1.0] * 3
    key = users.attention._users.keys_and_values[0][0]
    twins = users.attention.branches[0](users.null_embeds)[0]
    assert torch.equal(
        key[:3], users.attention.branches[0](torch.cat([users.null_embeds, users.embeds]))[0][:3]
    )
    torch.testing.assert_close(key[:3], twins)
    users.attention.clear()


def test_with_user_scale_0_only_the_unconditional_rows_are_steered(bundle):
    base = sample(bundle, PROMPTS, seeds=SEEDS, **HOW)
    users = steer(bundle, negative_scale=1.0, scale=0.0)
    assert not torch.equal(sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW), base)


def test_plain_schedules_and_block_scales_are_as_before_bit_for_bit(bundle):
    users = make_users(bundle, scale=1.0)
    plain = sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW)
    spelt = replace(users, schedule=UserSchedule(shape="constant"), block_scales={"down": 1.0, "up": 1.0})
    assert torch.equal(sample(bundle, PROMPTS, seeds=SEEDS, users=spelt, **HOW), plain)
    nowhere = replace(users, block_scales={"down": 0.0, "mid": 0.0, "up": 0.0})
    assert torch.equal(
        sample(bundle, PROMPTS, seeds=SEEDS, users=nowhere, **HOW),
        sample(bundle, PROMPTS, seeds=SEEDS, **HOW),
    )


def test_a_schedule_scales_the_steps_it_names_and_computes_keys_once(bundle, monkeypatch):
    users = replace(make_users(bundle, scale=1.0), schedule=UserSchedule(shape="linear"))
    seen, calls = [], []
    rescale = users.attention.rescale
    monkeypatch.setattr(users.attention, "rescale", lambda factor: seen.append(factor) or rescale(factor))
    users.attention.branches[0].to_k_user.register_forward_hook(lambda *_: calls.append(1))
    drawn = sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW)
    assert seen == [0.0, 1 / 3, 2 / 3, 1.0]
    assert len(calls) == 1
    plain = sample(bundle, PROMPTS, seeds=SEEDS, users=replace(users, schedule=CONSTANT), **HOW)
    assert not torch.equal(drawn, plain)
    early, late = (
        sample(bundle, PROMPTS, seeds=SEEDS, users=replace(users, schedule=UserSchedule(shape=shape)), **HOW)
        for shape in ("early", "late")
    )
    assert not torch.equal(early, late)
    never = replace(users, schedule=UserSchedule(until=0.01))
    assert torch.equal(
        sample(bundle, PROMPTS, seeds=SEEDS, users=never, **HOW), sample(bundle, PROMPTS, seeds=SEEDS, **HOW)
    )


def test_steering_goes_with_the_images_of_a_smaller_batch(bundle):
    users = replace(
        steer(bundle, negative_scale=0.5),
        schedule=UserSchedule(shape="late"),
        block_scales={"down": 0.5},
    )
    together = sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW)
    singly = sample(bundle, PROMPTS, seeds=SEEDS, users=users, batch_size=1, **HOW)
    torch.testing.assert_close(singly, together, rtol=0, atol=1e-4)
