"""The published sizes: on the meta device against the published IP-Adapter, and SD 1.5 for real (slow)."""

import pytest
import torch

import stock_ip_adapter
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import FusionShape
from prefgen.models.ip_adapter import export_ip_adapter, ip_adapter_tensors
from prefgen.models.sampling import SampleUsers, noise_for, sample
from prefgen.models.user_adapter import UserAdapter, save_user_adapter
from prefgen.testing.published import SD15, SDXL, image_encoder_on_meta, meta_unet, random_sd15

SD15_WIDTHS = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
SDXL_WIDTHS = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10


@pytest.mark.parametrize(("model", "millions"), [(SD15, 632.08), (SDXL, 1844.9)], ids=["vit_h", "vit_big_g"])
def test_the_image_encoders_have_the_published_sizes(model, millions):
    """The counts that IP-Adapter's page gives for the encoders it was trained with."""
    encoder = image_encoder_on_meta(model)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=1e-4)
    assert encoder.config.projection_dim == model.image_width


@pytest.mark.parametrize(
    ("model", "unet_parameters", "widths"),
    [(SD15, 859_520_964, SD15_WIDTHS), (SDXL, 2_567_463_684, SDXL_WIDTHS)],
    ids=["sd15", "sdxl"],
)
def test_the_adapter_has_the_published_layout(model, unet_parameters, widths):
    """Names, shapes and number of parameters of the IP-Adapter file published for the same base model."""
    unet = meta_unet(model)
    assert sum(p.numel() for p in unet.parameters()) == unet_parameters
    cross = model.unet["cross_attention_dim"]
    with torch.device("meta"):
        adapter = UserAdapter(
            unet, shape=FusionShape(parts=("image",), widths=(model.image_width,), cross_width=cross)
        )
    shapes = {name: tuple(t.shape) for name, t in ip_adapter_tensors(adapter.state_dict()).items()}
    expected = {
        "image_proj.proj.weight": (4 * cross, model.image_width),
        "image_proj.proj.bias": (4 * cross,),
        "image_proj.norm.weight": (cross,),
        "image_proj.norm.bias": (cross,),
    }
    for layer, width in enumerate(widths):
        for kind in ("k", "v"):
            expected[f"ip_adapter.{2 * layer + 1}.to_{kind}_ip.weight"] = (width, cross)
    assert shapes == expected
    assert len(adapter.attention.names) == {768: 16, 2048: 70}[cross]
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert trained == sum(adapter.num_parameters().values()) == model.ip_adapter_parameters


@pytest.mark.slow
@torch.no_grad()
def test_sd15_in_real_size_draws_the_same_from_the_export(tmp_path):
    stock = random_sd15()
    stock.set_progress_bar_config(disable=True)
    path = tmp_path / "pipeline"
    bundle = DiffusionBundle.of(stock.components, zero_empty_text=False, size=(64, 64))
    shape = FusionShape(parts=("aligned", "core", "image"), widths=(768, 64, 1024), cross_width=768)
    torch.manual_seed(0)
    adapter = UserAdapter(stock.unet, shape=shape)
    parts = {name: torch.randn(1, width) for name, width in zip(shape.parts, shape.widths, strict=True)}
    users = SampleUsers.of(adapter.requires_grad_(False), parts=parts, scale=0.8)
    adapter.attention.install()
    how = {"num_steps": 2, "guidance_scale": 3.0}
    ours = sample(bundle, ["a red fox"], seeds=[3], users=users, **how)
    adapter.attention.remove()
    base = sample(bundle, ["a red fox"], seeds=[3], **how)
    save_user_adapter(adapter, path=tmp_path / "user_adapter.safetensors", lineage={})
    path = tmp_path / "ip_adapter.safetensors"
    export_ip_adapter(tmp_path / "user_adapter.safetensors", path=path, projector=None)
    stock_ip_adapter.load(stock, path)
    stock.set_ip_adapter_scale(0.8)
    fusion = adapter.fusion
    theirs = stock(
        "a red fox",
        height=64,
        width=64,
        latents=noise_for([3], bundle=bundle),
        ip_adapter_image_embeds=[torch.cat([fusion.null_rows(1), fusion.rows(parts)])],
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    difference = float(((ours * 0.5 + 0.5).clamp(0, 1) - theirs).abs().max())
    print(f"largest pixel difference {difference:g}, user against base {float((ours - base).abs().max()):g}")
    assert not torch.equal(ours, base)
    assert difference == 0.0
