"""The adapter as a whole: its state, and what a stock diffusers pipeline makes of its export."""

import pytest
import torch

from prefgen.errors import CheckpointError
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import FusionShape
from prefgen.models.pixels import to_uint8
from prefgen.models.sampling import SampleUsers, noise_for, sample
from prefgen.models.user_adapter import (
    UserAdapter,
    load_ip_adapter_state,
    load_user_adapter,
    save_user_adapter,
    to_ip_adapter_state,
)

SHAPE = FusionShape(parts=("aligned", "core", "image"), widths=(16, 10, 12), cross_width=16)
PROMPTS = ["a red fox", "a blue boat"]


@pytest.fixture
def bundle(tiny_pipeline):
    return DiffusionBundle.load(str(tiny_pipeline))


@pytest.fixture
def adapter(bundle):
    torch.manual_seed(0)
    adapter = UserAdapter(bundle.unet, shape=SHAPE)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


def draw_parts(count=2):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(count, width, generator=generator)
        for name, width in zip(SHAPE.parts, SHAPE.widths, strict=True)
    }


@pytest.mark.parametrize("scale", [0.8, 1.0])
@torch.no_grad()
def test_stock_diffusers_draws_our_images_from_the_export(bundle, adapter, tiny_pipeline, tmp_path, scale):
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    parts = draw_parts(1)
    adapter.fusion.standardise(draw_parts(20))
    adapter.attention.install()
    twice = {name: value.expand(2, -1) for name, value in parts.items()}
    users = SampleUsers.of(adapter, parts=twice, scale=scale)
    ours = sample(bundle, PROMPTS, seeds=[3, 4], users=users, num_steps=4, guidance_scale=3.0)

    state = to_ip_adapter_state(adapter)
    flat = {f"{group}.{name}": value for group, tensors in state.items() for name, value in tensors.items()}
    save_file(flat, tmp_path / "ip_adapter.safetensors")
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    stock.set_progress_bar_config(disable=True)
    stock.load_ip_adapter(
        str(tmp_path), subfolder="", weight_name="ip_adapter.safetensors", low_cpu_mem_usage=False
    )
    stock.set_ip_adapter_scale(scale)
    fusion = adapter.fusion
    theirs = stock(
        PROMPTS,
        latents=noise_for([3, 4], bundle=bundle),
        # The stock pipeline repeats what it is given for each prompt: one user per call.
        ip_adapter_image_embeds=[torch.cat([fusion.null_rows(1), fusion.rows(parts)])],
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    ).images
    base = sample(bundle, PROMPTS, seeds=[3, 4], num_steps=4, guidance_scale=3.0)
    assert not torch.equal(ours, base)
    difference = (ours * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) - torch.from_numpy(theirs)
    assert float(difference.abs().max()) == 0.0
    assert (to_uint8(ours) == (theirs * 255).round().astype("uint8")).all()


def test_the_export_comes_back(bundle, adapter):
    state = to_ip_adapter_state(adapter)
    other = UserAdapter(bundle.unet, shape=SHAPE)
    load_ip_adapter_state(other, state=state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, adapter.state_dict()[name]), name


def test_an_export_for_another_unet_is_refused(bundle, adapter):
    state = to_ip_adapter_state(adapter)
    missing = {**state, "ip_adapter": {n: v for n, v in state["ip_adapter"].items() if n[0] != "1"}}
    with pytest.raises(CheckpointError, match=r"ip_adapter\.1\.to_k_ip\.weight is missing or unknown"):
        load_ip_adapter_state(adapter, state=missing)
    state["image_proj"]["norm.bias"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"image_proj\.norm\.bias has shape \(3,\)"):
        load_ip_adapter_state(adapter, state=state)


def test_state_holds_trained_parts_and_statistics_only(bundle, adapter):
    layers = len(adapter.attention.names)
    assert len(adapter.state_dict()) == 2 * layers + 6
    counts = adapter.num_parameters()
    assert counts["fusion"] == 38 * 64 + 64 + 2 * 16
    assert counts["attention"] == sum(p.numel() for p in adapter.attention.parameters())


def test_a_shape_for_another_unet_is_refused(bundle):
    with pytest.raises(CheckpointError, match="width 99 for a UNet of"):
        UserAdapter(bundle.unet, shape=FusionShape(parts=("core",), widths=(4,), cross_width=99))


def test_the_artefact_comes_back_and_broken_ones_are_refused(bundle, adapter, tmp_path):
    path = tmp_path / "deep" / "user_adapter.safetensors"
    with pytest.raises(CheckpointError, match="run 'prefgen fit --stage inject' first"):
        load_user_adapter(path, unet=bundle.unet)
    adapter.fusion.standardise(draw_parts(20))
    save_user_adapter(adapter, path=path, lineage={"mllm": "abc"})
    loaded = load_user_adapter(path, unet=bundle.unet)
    assert loaded.lineage == {"mllm": "abc"}
    assert loaded.adapter.fusion.shape == SHAPE
    for name, value in loaded.adapter.state_dict().items():
        assert torch.equal(value, adapter.state_dict()[name]), name
    assert not any(p.requires_grad for p in loaded.adapter.parameters())
    assert path.stat().st_mode & 0o777 == 0o644
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match="no user adapter or torn"):
        load_user_adapter(path, unet=bundle.unet)


def test_an_artefact_of_another_kind_is_refused(bundle, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no user adapter of version 1"):
        load_user_adapter(path, unet=bundle.unet)
