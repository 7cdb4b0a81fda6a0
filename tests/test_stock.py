"""Stock pipelines that draw for users: against the same pipelines with the exported adapter loaded."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import stock_ip_adapter
from prefgen.artefacts import Artefacts
from prefgen.errors import CheckpointError, ConfigError, DataError
from prefgen.exporting import export_for_diffusers
from prefgen.models.text_lora import add_text_lora, save_text_lora
from prefgen.models.user_schedule import UserSchedule
from prefgen.pipeline import PrefGenPipeline
from prefgen.stock import StockPipeline
from prefgen.testing.artefacts import random_profile, save_tiny_artefacts

HOW = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_artefacts(tmp_path_factory.mktemp("artefacts") / "tiny")


@pytest.fixture(scope="module")
def artefacts(folder):
    return Artefacts.find(folder, pipeline=folder / "pipeline")


@pytest.fixture(scope="module")
def profiles(folder):
    return [random_profile(folder, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def exported(artefacts, profiles, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    profiles[0].save(out / "me.safetensors")
    return export_for_diffusers(artefacts, out=out / "adapter").adapter, out / "me.safetensors"


def load(folder, kind="StableDiffusionPipeline", scheduler=None):
    import diffusers

    pipe = getattr(diffusers, kind).from_pretrained(folder / "pipeline", low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe


def add_lora(pipe):
    """A LoRA such as people load: on self- and cross-attention, and not the identity."""
    from peft import LoraConfig

    torch.manual_seed(7)
    pipe.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]), adapter_name="style"
    )
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


MASK = Image.fromarray(np.repeat(np.array([[0], [255]], dtype=np.uint8), 8, axis=0).repeat(16, axis=1))
CASES = {
    "text": {},
    "euler": {"scheduler": "EulerDiscreteScheduler"},
    "dpm": {"scheduler": "DPMSolverMultistepScheduler"},
    "heun": {"scheduler": "HeunDiscreteScheduler"},
    "lora": {"lora": True},
    "img2img": {
        "kind": "StableDiffusionImg2ImgPipeline",
        "inputs": {"image": picture(1), "strength": 0.8},
    },
    "inpaint": {
        "kind": "StableDiffusionInpaintPipeline",
        "inputs": {"image": picture(2), "mask_image": MASK, "strength": 1.0},
    },
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_each_kind_of_pipeline_draws_what_the_exported_adapter_draws(
    folder, artefacts, profiles, exported, name
):
    case = {"kind": "StableDiffusionPipeline", "scheduler": None, "inputs": {}, "lora": False} | CASES[name]
    pipes = [load(folder, case["kind"], case["scheduler"]) for _ in range(2)]
    if case["lora"]:
        for pipe in pipes:
            add_lora(pipe)

    def draw(run, **more):
        return run(
            "a red fox", generator=torch.Generator().manual_seed(3), **case["inputs"], **HOW, **more
        ).images

    base = draw(pipes[0])
    processors = dict(pipes[0].unet.attn_processors)
    stock = StockPipeline.wrap(pipes[0], artefacts=artefacts)
    assert torch.equal(draw(stock, profiles=profiles[0], user_scale=0.0), base), "user_scale=0"
    computed = []
    hook = stock.side.adapter.attention.branches[0].to_k_user.register_forward_hook(
        lambda *_: computed.append(1)
    )
    ours = draw(stock, profiles=profiles[0], user_scale=0.8)
    hook.remove()
    assert len(computed) == 1, "keys and values are computed once per image, not once per step"
    assert torch.equal(draw(pipes[0]), base), "users do not outlive their call"
    stock.remove()
    after = pipes[0].unet.attn_processors
    assert all(after[key] is processor for key, processor in processors.items())
    assert torch.equal(draw(pipes[0]), base), "removed"
    adapter, _ = exported
    stock_ip_adapter.load(pipes[1], adapter)
    pipes[1].set_ip_adapter_scale(0.8)
    fusion = stock.side.adapter.fusion
    embeds = torch.cat([fusion.null_rows(1), fusion.rows(stock.side.parts(profiles[0], count=1))])
    theirs = draw(pipes[1], ip_adapter_image_embeds=[embeds])
    assert not torch.equal(ours, base)
    assert float((ours - theirs).abs().max()) == 0.0


def test_it_draws_what_our_own_loop_draws(folder, artefacts, profiles):
    stock = PrefGenPipeline(artefacts, dtype=torch.float32, device="cpu").wrap(load(folder))
    schedule = UserSchedule(shape="late")
    for more in ({}, {"negative_user_scale": 0.5}, {"schedule": schedule, "block_scales": {"down": 0.5}}):
        theirs = stock(
            "a red fox",
            profiles=profiles[0],
            user_scale=0.7,
            generator=torch.Generator().manual_seed(3),
            num_inference_steps=4,
            guidance_scale=3.0,
            **more,
        ).images[0]
        ours = PrefGenPipeline(artefacts, dtype=torch.float32, device="cpu").generate(
            "a red fox",
            profile=profiles[0],
            user_scale=0.7,
            seed=3,
            num_steps=4,
            guidance_scale=3.0,
            **more,
        )[0]
        assert np.array_equal(np.asarray(ours), np.asarray(theirs)), more


def test_several_users_in_one_batch_each_with_its_scale(folder, artefacts, profiles):
    pipe = load(folder)
    prompts = ["a red fox", "a blue boat"]
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    base = pipe(prompts, latents=noise, num_images_per_prompt=2, **HOW).images
    stock = StockPipeline.wrap(pipe, artefacts=artefacts)
    both = stock(
        prompts,
        latents=noise,
        num_images_per_prompt=2,
        profiles=profiles,
        user_scale=[0.0, 0.9],
        **HOW,
    ).images
    assert torch.equal(both[:2], base[:2]), "the rows of a user at scale 0 are the base model's"
    alone = stock(prompts[1], latents=noise[2:3], profiles=profiles[1], user_scale=0.9, **HOW).images
    # Products of another batch size may round differently.
    torch.testing.assert_close(both[2:3], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(both[2:], base[2:], atol=1e-3)


def test_mistakes_are_refused_with_words(folder, artefacts, profiles, exported):
    pipe = load(folder)
    stock = StockPipeline.wrap(pipe, artefacts=artefacts)
    with pytest.raises(DataError, match="2 profiles or scales for 1 prompts"):
        stock("a fox", profiles=profiles, **HOW)
    with pytest.raises(DataError, match="guidance_scale 1 switches off"):
        stock("a fox", profiles=profiles[0], negative_user_scale=1.0, guidance_scale=1.0)
    with pytest.raises(CheckpointError, match="another mllm"):
        stock("a fox", profiles=replace(profiles[0], lineage={"mllm": "f" * 64}), **HOW)
    stock.remove()
    adapter, _ = exported
    stock_ip_adapter.load(pipe, adapter)
    with pytest.raises(ConfigError, match="unload other adapters"):
        StockPipeline.wrap(pipe, artefacts=artefacts)


@pytest.mark.parametrize("has_style", [False, True])
def test_removal_takes_the_text_lora_along(folder, profiles, tmp_path, has_style):
    """The layers are the pipeline's own again, by name and to the last bit; a LoRA of the user's stays."""
    trained = tmp_path / "trained"
    shutil.copytree(folder, trained)
    source = load(folder).unet
    add_text_lora(source, rank=2)
    for name, parameter in source.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_text_lora(source, path=trained / "text_lora.safetensors")
    pipe = load(folder)
    if has_style:
        add_lora(pipe)

    def draw(run, **more):
        return run("a red fox", generator=torch.Generator().manual_seed(3), **HOW, **more).images

    names, base = list(pipe.unet.state_dict()), draw(pipe)
    stock = StockPipeline.wrap(pipe, artefacts=Artefacts.find(trained, pipeline=folder / "pipeline"))
    assert not torch.equal(draw(stock, profiles=profiles[0], user_scale=0.8), base)
    stock.remove()
    assert list(pipe.unet.state_dict()) == names
    assert torch.equal(draw(pipe), base)
