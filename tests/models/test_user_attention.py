"""The user branch: off it is the base model bit for bit, on it changes only what it should."""

import itertools

import pytest
import torch

from prefgen.errors import ConfigError, DataError
from prefgen.models.diffusion import DiffusionBundle, TextCondition
from prefgen.models.fusion import FusionShape
from prefgen.models.user_adapter import UserAdapter
from prefgen.models.user_attention import UserAttention, install

SHAPE = FusionShape(parts=("aligned", "core", "image"), widths=(16, 10, 12), cross_width=16)
BATCH = 4


@pytest.fixture
def bundle(tiny_pipeline):
    return DiffusionBundle.load(str(tiny_pipeline))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    text = TextCondition(
        hidden=torch.randn(BATCH, 24, 16, generator=generator),
        pooled=torch.randn(BATCH, 16, generator=generator),
    )
    return {
        "latents": torch.randn(BATCH, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([1, 300, 700, 999]),
        "text": text,
    }


def draw_users(*, seed=2):
    return torch.randn(BATCH, 12, 16, generator=torch.Generator().manual_seed(seed))


def predict(bundle, inputs):
    with torch.no_grad():
        return bundle.denoise(inputs["latents"], timesteps=inputs["timesteps"], text=inputs["text"])


def test_scale_zero_is_the_base_bit_for_bit(bundle, inputs):
    base = predict(bundle, inputs)
    attention = install(bundle.unet)
    assert torch.equal(predict(bundle, inputs), base), "installed, no users set"
    attention.set(draw_users(), user_scale=0.0)
    assert torch.equal(predict(bundle, inputs), base)
    attention.set(draw_users(), user_scale=0.5)
    assert not torch.equal(predict(bundle, inputs), base)


@pytest.mark.parametrize("pattern", list(itertools.product([0.0, 1.0], repeat=BATCH)))
def test_scales_alternate_within_a_batch(bundle, inputs, pattern):
    base = predict(bundle, inputs)
    attention = install(bundle.unet)
    users = draw_users()
    attention.set(users, user_scale=1.0)
    all_on = predict(bundle, inputs)
    attention.set(users, user_scale=list(pattern))
    mixed = predict(bundle, inputs)
    for row, scale in enumerate(pattern):
        expected = all_on if scale else base
        assert torch.equal(mixed[row], expected[row]), f"row {row} of {pattern}"


def test_a_row_at_zero_survives_users_that_are_not_finite(bundle, inputs):
    base = predict(bundle, inputs)
    attention = install(bundle.unet)
    users = draw_users()
    users[1] = float("nan")
    attention.set(users, user_scale=[1.0, 0.0, 1.0, 1.0])
    assert torch.equal(predict(bundle, inputs)[1], base[1])


def test_remove_gives_back_the_very_processors_and_state(bundle, inputs):
    base, processors = predict(bundle, inputs), dict(bundle.unet.attn_processors)
    state = {name: value.clone() for name, value in bundle.unet.state_dict().items()}
    attention = install(bundle.unet)
    assert bundle.unet.state_dict().keys() == state.keys(), "the UNet's own state must not grow"
    attention.set(draw_users(), user_scale=1.0)
    predict(bundle, inputs)
    attention.remove()
    after = bundle.unet.attn_processors
    assert all(after[name] is processor for name, processor in processors.items())
    assert all(torch.equal(bundle.unet.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(predict(bundle, inputs), base)
    attention.install()
    assert torch.equal(predict(bundle, inputs), base), "users do not outlive a removal"


def test_keys_computed_once_equal_keys_computed_at_every_step(bundle, inputs):
    attention = install(bundle.unet)
    users = draw_users()
    attention.set(users, user_scale=0.7)
    once = [predict(bundle, inputs) for _ in range(2)]
    attention.set(users, user_scale=0.7)
    assert torch.equal(once[0], once[1])
    assert torch.equal(once[0], predict(bundle, inputs))
    single = []
    for row in range(BATCH):
        attention.set(users[row : row + 1], user_scale=0.7)
        text = TextCondition(hidden=inputs["text"].hidden[row : row + 1], pooled=inputs["text"].pooled)
        with torch.no_grad():
            single.append(
                bundle.denoise(
                    inputs["latents"][row : row + 1], timesteps=inputs["timesteps"][row], text=text
                )
            )
    # Matrix products of another batch size may round differently; measured 8e-7.
    torch.testing.assert_close(torch.cat(single), once[0], rtol=0, atol=5e-6)


def test_begins_from_the_frozen_text_projections(bundle):
    attention = UserAttention(bundle.unet)
    modules = dict(bundle.unet.named_modules())
    assert attention.names
    for name, branch in zip(attention.names, attention.branches, strict=True):
        frozen = modules[name.removesuffix(".processor")]
        assert torch.equal(branch.to_k_user.weight, frozen.to_k.weight)
        assert torch.equal(branch.to_v_user.weight, frozen.to_v.weight)
        assert branch.to_k_user.weight.data_ptr() != frozen.to_k.weight.data_ptr()


def test_only_fusion_and_user_projections_get_gradients(bundle, inputs):
    adapter = UserAdapter(bundle.unet, shape=SHAPE)
    adapter.attention.install()
    parts = {
        "aligned": torch.randn(BATCH, 16),
        "core": torch.randn(BATCH, 10),
        "image": torch.randn(BATCH, 12),
    }
    adapter.attention.set(adapter.tokens(parts), user_scale=1.0)
    loss = (
        bundle.denoise(inputs["latents"], timesteps=inputs["timesteps"], text=inputs["text"]).square().mean()
    )
    loss.backward()
    with_gradient = [n for n, p in adapter.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert with_gradient == [name for name, _ in adapter.named_parameters()]
    assert {name.split(".")[-2] for name in with_gradient} == {"proj", "norm", "to_k_user", "to_v_user"}
    for module in (bundle.unet, bundle.vae, bundle.text_encoder, bundle.image_encoder):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())


def test_gradient_checkpointing_keeps_the_gradients(bundle, inputs):
    gradients = []
    for checkpointing in (False, True):
        attention = install(bundle.unet)
        if checkpointing:
            bundle.unet.enable_gradient_checkpointing()
        attention.set(draw_users(), user_scale=1.0)
        prediction = bundle.denoise(inputs["latents"], timesteps=inputs["timesteps"], text=inputs["text"])
        prediction.square().mean().backward()
        gradients.append([branch.to_v_user.weight.grad.clone() for branch in attention.branches])
        attention.remove()
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_wrong_numbers_are_refused_with_words(bundle, inputs):
    attention = install(bundle.unet)
    with pytest.raises(DataError, match="3 user scales for 4 users"):
        attention.set(draw_users(), user_scale=[1.0, 1.0, 1.0])
    with pytest.raises(DataError, match="finite"):
        attention.set(draw_users(), user_scale=float("nan"))
    attention.set(draw_users()[:2], user_scale=1.0)
    with pytest.raises(DataError, match="users for 2 rows, but the UNet was called with 4"):
        predict(bundle, inputs)


def test_another_attention_processor_is_refused(bundle):
    from diffusers.models.attention_processor import AttnProcessor

    bundle.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(ConfigError, match="set_default_attn_processor"):
        install(bundle.unet)


def test_building_draws_no_random_numbers(bundle):
    before = torch.get_rng_state()
    UserAttention(bundle.unet)
    assert torch.equal(torch.get_rng_state(), before)


def test_rescaling_changes_the_scale_and_nothing_else(bundle, inputs):
    base = predict(bundle, inputs)
    attention = install(bundle.unet)
    attention.set(draw_users(), user_scale=0.7)
    full = predict(bundle, inputs)
    computed = attention.branches[0].to_k_user
    calls = []
    handle = computed.register_forward_hook(lambda *_: calls.append(1))
    attention.rescale(0.0)
    assert torch.equal(predict(bundle, inputs), base)
    attention.rescale(0.5)
    half = predict(bundle, inputs)
    attention.rescale(1.0)
    assert torch.equal(predict(bundle, inputs), full)
    handle.remove()
    assert not calls, "keys and values are computed when users are set, never again"
    attention.set(draw_users(), user_scale=0.35)
    torch.testing.assert_close(predict(bundle, inputs), half)


def test_a_new_set_forgets_the_factors_of_the_last(bundle, inputs):
    attention = install(bundle.unet)
    attention.set(draw_users(), user_scale=0.7)
    full = predict(bundle, inputs)
    attention.set(draw_users(), user_scale=0.7, block_scales={"down": 0.0})
    attention.rescale(0.3)
    attention.set(draw_users(), user_scale=0.7)
    assert torch.equal(predict(bundle, inputs), full)


def test_scales_by_block(bundle, inputs):
    base = predict(bundle, inputs)
    attention = install(bundle.unet)
    blocks = sorted({name.split("_")[0] for name in attention.names})
    assert len(blocks) > 1, "the tiny UNet must have several kinds of blocks"
    attention.set(draw_users(), user_scale=0.7)
    full = predict(bundle, inputs)
    attention.set(draw_users(), user_scale=0.7, block_scales=dict.fromkeys(blocks, 1.0))
    assert torch.equal(predict(bundle, inputs), full)
    attention.set(draw_users(), user_scale=0.7, block_scales=dict.fromkeys(blocks, 0.0))
    assert torch.equal(predict(bundle, inputs), base)
    attention.set(draw_users(), user_scale=0.7, block_scales={blocks[0]: 0.0})
    some = predict(bundle, inputs)
    assert not torch.equal(some, base)
    assert not torch.equal(some, full)
    with pytest.raises(DataError, match="no cross-attention is in block 'middle'; this UNet has down_blocks"):
        attention.set(draw_users(), user_scale=0.7, block_scales={"middle": 1.0})
