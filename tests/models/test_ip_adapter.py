"""The IP-Adapter format: stock diffusers draws our pictures from it, and we draw those of a stock file."""

import inspect

import pytest
import torch
from safetensors.torch import load_file, save_file

import stock_ip_adapter
from prefgen.errors import CheckpointError
from prefgen.models.diffusion import DiffusionBundle
from prefgen.models.fusion import FusionShape
from prefgen.models.ip_adapter import begin_from, export_ip_adapter, load_adapter, read_adapter
from prefgen.models.sampling import SampleUsers, noise_for, sample
from prefgen.models.user_adapter import UserAdapter, save_user_adapter
from prefgen.testing.diffusion import TINY_IMAGE_DIM, save_tiny_sdxl

SHAPE = FusionShape(parts=("aligned", "core", "image"), widths=(16, 10, TINY_IMAGE_DIM), cross_width=16)
PROMPTS, SEEDS = ["a red fox", "a blue boat"], [3, 4]
HOW = {"num_steps": 4, "guidance_scale": 3.0}


@pytest.fixture
def bundle(tiny_pipeline):
    return DiffusionBundle.load(str(tiny_pipeline))


def make_adapter(bundle, *, shape=SHAPE):
    torch.manual_seed(0)
    adapter = UserAdapter(bundle.unet, shape=shape)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.fusion.standardise(draw_parts(shape, count=20))
    return adapter


def draw_parts(shape, *, count):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(count, width, generator=generator)
        for name, width in zip(shape.parts, shape.widths, strict=True)
    }


def export(adapter, folder, **how):
    save_user_adapter(adapter, path=folder / "user_adapter.safetensors", lineage={"mllm": "abc"})
    path = folder / "ip_adapter.safetensors"
    export_ip_adapter(folder / "user_adapter.safetensors", path=path, projector=None, **how)
    return path


def stock_pictures(pipeline, path, *, embeds, scale, noise):
    from diffusers import DiffusionPipeline

    stock = DiffusionPipeline.from_pretrained(pipeline, low_cpu_mem_usage=False)
    stock.set_progress_bar_config(disable=True)
    stock_ip_adapter.load(stock, path)
    stock.set_ip_adapter_scale(scale)
    pictures = stock(
        PROMPTS,
        latents=noise,
        # The stock pipeline repeats what it is given for each prompt: one user per call.
        ip_adapter_image_embeds=[embeds],
        num_inference_steps=HOW["num_steps"],
        guidance_scale=HOW["guidance_scale"],
        output_type="np",
    ).images
    return torch.from_numpy(pictures)


def unit(pixels):
    return (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@torch.no_grad()
def test_stock_diffusers_draws_our_pictures_from_the_export(tiny_pipeline, tmp_path, kind):
    pipeline = tiny_pipeline if kind == "sd" else save_tiny_sdxl(tmp_path / "xl")
    bundle = DiffusionBundle.load(str(pipeline))
    shape = FusionShape(parts=SHAPE.parts, widths=SHAPE.widths, cross_width=bundle.cross_width)
    adapter = make_adapter(bundle, shape=shape)
    path = export(adapter, tmp_path)
    adapter.attention.install()
    parts = draw_parts(shape, count=1)
    twice = {name: value.expand(2, -1) for name, value in parts.items()}
    users = SampleUsers.of(adapter, parts=twice, scale=0.8)
    ours = unit(sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW))
    fusion = adapter.fusion
    embeds = torch.cat([fusion.null_rows(1), fusion.rows(parts)])
    noise = noise_for(SEEDS, bundle=bundle)
    theirs = stock_pictures(pipeline, path, embeds=embeds, scale=0.8, noise=noise)
    base = unit(sample(bundle, PROMPTS, seeds=SEEDS, **HOW))
    assert not torch.equal(ours, base)
    assert float((ours - theirs).abs().max()) == 0.0


@torch.no_grad()
def test_a_stock_file_draws_its_pictures_here(bundle, tiny_pipeline, tmp_path):
    assert "import prefgen" not in inspect.getsource(stock_ip_adapter)
    assert "from prefgen" not in inspect.getsource(stock_ip_adapter)
    path = tmp_path / "theirs.safetensors"
    embeds, theirs = stock_ip_adapter.make(
        tiny_pipeline,
        path,
        image_width=TINY_IMAGE_DIM,
        prompts=PROMPTS,
        seeds=SEEDS,
        steps=HOW["num_steps"],
        guidance_scale=HOW["guidance_scale"],
        scale=0.7,
    )
    loaded = load_adapter(path, unet=bundle.unet)
    assert loaded.adapter.fusion.shape.parts == ("image",)
    assert loaded.lineage == {}
    loaded.adapter.attention.install()
    users = SampleUsers.of(loaded.adapter, parts={"image": embeds[1].expand(2, -1)}, scale=0.7)
    ours = unit(sample(bundle, PROMPTS, seeds=SEEDS, users=users, **HOW))
    assert float((ours - theirs).abs().max()) == 0.0
    begun = UserAdapter(
        bundle.unet, shape=FusionShape(parts=("image",), widths=(TINY_IMAGE_DIM,), cross_width=16)
    )
    assert begin_from(begun, read_adapter(path)) == {"image"}
    for name, value in loaded.adapter.state_dict().items():
        assert torch.equal(begun.state_dict()[name], value), name


def test_the_export_comes_back(bundle, tmp_path):
    adapter = make_adapter(bundle)
    path = export(adapter, tmp_path)
    loaded = load_adapter(path, unet=bundle.unet)
    assert loaded.lineage == {"mllm": "abc"}
    assert loaded.adapter.fusion.shape == SHAPE
    for name, value in loaded.adapter.state_dict().items():
        assert torch.equal(value, adapter.state_dict()[name]), name
    own = load_adapter(tmp_path / "user_adapter.safetensors", unet=bundle.unet)
    assert own.adapter.state_dict().keys() == loaded.adapter.state_dict().keys()


def test_half_precision_is_near_and_half_as_large(bundle, tmp_path):
    adapter = make_adapter(bundle)
    path = export(adapter, tmp_path, dtype=torch.float16)
    tensors = load_file(path)
    assert tensors["image_proj.proj.weight"].dtype == torch.float16
    assert tensors["prefgen.fusion.mean"].dtype == torch.float32
    loaded = load_adapter(path, unet=bundle.unet)
    for name, value in loaded.adapter.state_dict().items():
        torch.testing.assert_close(value, adapter.state_dict()[name], rtol=1e-3, atol=1e-3)


def test_training_begins_from_what_a_file_knows(bundle, tmp_path):
    """A file of one part gives that part its tokens; the tokens of the others are those of nobody."""
    known = FusionShape(parts=("image",), widths=(TINY_IMAGE_DIM,), cross_width=16)
    source = make_adapter(bundle, shape=known)
    path = export(source, tmp_path)
    torch.manual_seed(5)
    adapter = UserAdapter(bundle.unet, shape=SHAPE)
    assert begin_from(adapter, read_adapter(path)) == {"image"}
    parts = draw_parts(SHAPE, count=3)
    with torch.no_grad():
        tokens = adapter.tokens(parts)
        theirs = source.tokens({"image": parts["image"]})
        nobody = source.null_tokens(3)
    torch.testing.assert_close(tokens[:, 8:], theirs)
    torch.testing.assert_close(tokens[:, :8], torch.cat([nobody, nobody], dim=1))
    before = adapter.fusion.mean.clone()
    adapter.fusion.standardise({name: value for name, value in parts.items() if name != "image"})
    assert torch.equal(adapter.fusion.mean[26:], before[26:])
    assert bool(adapter.fusion.mean[:26].any())
    adapter.attention.set(adapter.tokens(parts))
    adapter.attention.clear()


def test_rows_of_one_new_part_start_apart(bundle, tmp_path):
    """Equal columns over equal inputs would have equal gradients, and three rows would train as one."""
    path = export(
        make_adapter(bundle, shape=FusionShape(parts=("core",), widths=(10,), cross_width=16)), tmp_path
    )
    shape = FusionShape(parts=("image", "image"), widths=(TINY_IMAGE_DIM, TINY_IMAGE_DIM), cross_width=16)
    adapter = UserAdapter(bundle.unet, shape=shape)
    assert begin_from(adapter, read_adapter(path)) == frozenset()
    first, second = (adapter.fusion.proj.weight[:, span] for _, span in shape.spans())
    assert 0 < (first - second).abs().mean() < 0.2 * TINY_IMAGE_DIM**-0.5


def test_files_that_cannot_be_taken_over_are_refused_with_words(bundle, tmp_path):
    adapter = make_adapter(bundle)
    path = export(adapter, tmp_path)
    with pytest.raises(CheckpointError, match="pickled and could run code"):
        read_adapter(tmp_path / "ip-adapter_sd15.bin")
    with pytest.raises(CheckpointError, match="no adapter at"):
        read_adapter(tmp_path / "nothing.safetensors")
    stock = {name: value for name, value in load_file(path).items() if not name.startswith("prefgen.")}
    other = tmp_path / "other.safetensors"
    save_file({"image_proj.latents": torch.ones(1, 16, 8)}, other)
    with pytest.raises(CheckpointError, match="not the plus, full or face ones"):
        read_adapter(other)
    save_file({"weight": torch.ones(2)}, other)
    with pytest.raises(CheckpointError, match="it holds no image_proj"):
        read_adapter(other)
    save_file({name: value for name, value in stock.items() if ".1.to_k" not in name}, other)
    with pytest.raises(CheckpointError, match=r"ip_adapter\.1\.to_k_ip\.weight"):
        read_adapter(other)
    last = max(int(name.split(".")[1]) for name in stock if name.startswith("ip_adapter."))
    save_file({name: value for name, value in stock.items() if f".{last}." not in name}, other)
    layers = len(adapter.attention.names)
    with pytest.raises(CheckpointError, match=f"has {layers - 1} cross-attentions, this UNet has {layers}"):
        load_adapter(other, unet=bundle.unet)
    save_file(stock | {"ip_adapter.1.to_k_ip.weight": torch.ones(4, 16)}, other)
    with pytest.raises(CheckpointError, match=r"to_k_user.weight has shape \(4, 16\)"):
        load_adapter(other, unet=bundle.unet)
    narrow = UserAdapter(
        bundle.unet, shape=FusionShape(parts=("image",), widths=(TINY_IMAGE_DIM + 1,), cross_width=16)
    )
    with pytest.raises(CheckpointError, match="reads image embeddings of width 12, here they have 13"):
        begin_from(narrow, read_adapter(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match="is no adapter or torn"):
        read_adapter(path)
