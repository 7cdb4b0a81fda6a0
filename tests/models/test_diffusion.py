"""The frozen bundle: what it encodes, what it refuses, and that nothing of it trains."""

import numpy as np
import pytest
import torch
from PIL import Image

from prefgen.errors import DataError
from prefgen.models.diffusion import DiffusionBundle, fit_words
from prefgen.models.pixels import to_pil, to_pixels, to_uint8


@pytest.fixture(scope="module")
def bundle(tiny_pipeline):
    return DiffusionBundle.load(str(tiny_pipeline))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(3)]


def test_everything_is_frozen_and_small(bundle):
    modules = [bundle.unet, bundle.vae, bundle.text_encoder, bundle.image_encoder]
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert not any(module.training for module in modules)
    assert sum(p.numel() for module in modules for p in module.parameters()) < 100_000
    assert bundle.latent_shape == (4, 8, 8)
    assert bundle.image_size == (16, 16)
    assert (bundle.cross_width, bundle.image_width) == (16, 12)


def test_text_equals_the_stock_pipelines(bundle, tiny_pipeline):
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    prompts = ["a red fox", "a blue boat, line art"]
    theirs, _ = stock.encode_prompt(prompts, "cpu", 1, False)
    ours = bundle.encode_text(prompts)
    assert torch.equal(ours.hidden, theirs)
    assert ours.pooled.shape == (2, 16)
    ends = [len(bundle.tokenizer(prompt)["input_ids"]) - 1 for prompt in prompts]
    at_end = torch.stack([ours.hidden[row, end] for row, end in enumerate(ends)])
    torch.testing.assert_close(ours.pooled, at_end, msg="pooled must be read at the end of each text")


def test_a_long_prompt_is_refused_never_cut(bundle):
    with pytest.raises(DataError, match="for a text encoder of 24"):
        bundle.encode_text(["a fox", "zebra " * 30])


def test_words_that_fit_are_drawn_anew(bundle):
    words = [f"warm palette {n}" for n in range(9)]
    lists = [fit_words(words, tokenizer=bundle.tokenizer, rng=np.random.default_rng(i)) for i in range(20)]
    assert all(len(bundle.tokenizer(text)["input_ids"]) <= 24 for text in lists)
    assert {word for text in lists for word in text.split(", ")} == set(words)
    bundle.encode_text(lists)


def test_unknown_letters_do_not_end_the_text(bundle):
    ids = bundle.tokenizer("日本 ö")["input_ids"]
    assert ids.count(bundle.tokenizer.eos_token_id) == 1


def test_latents_are_drawn_from_the_posterior(bundle, pictures):
    pixels = to_pixels(pictures, size=bundle.image_size)
    moments = bundle.encode_moments(pixels)
    first = bundle.encode_latents(pixels, generator=torch.Generator().manual_seed(3))
    again = bundle.encode_latents(pixels, generator=torch.Generator().manual_seed(3))
    other = bundle.encode_latents(pixels, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    mean = bundle.draw_latents(moments, noise=torch.zeros_like(moments.mean))
    torch.testing.assert_close(mean, moments.mean * bundle.vae.config.scaling_factor)
    assert bundle.decode_latents(first).shape == (3, 3, 16, 16)


def test_pictures_and_their_pixels_have_one_embedding(bundle, pictures):
    from_pictures = bundle.embed_images(pictures)
    from_pixels = bundle.embed_images(to_pixels(pictures, size=(16, 16)))
    assert from_pictures.shape == (3, 12)
    assert torch.equal(from_pictures, from_pixels)


def test_pixels_round_trip_and_cover(pictures):
    pixels = to_pixels(pictures, size=(16, 16))
    assert float(pixels.min()) >= -1
    assert float(pixels.max()) <= 1
    assert np.array_equal(to_uint8(pixels), np.stack([np.asarray(picture) for picture in pictures]))
    assert to_pil(pixels)[0].size == (16, 16)
    wide = Image.new("RGB", (64, 20))
    assert to_pixels([wide], size=(8, 16)).shape == (1, 3, 8, 16)


def test_no_pipeline_there(tmp_path):
    with pytest.raises(DataError, match="no diffusers pipeline at"):
        DiffusionBundle.load(str(tmp_path / "nothing"))


def test_a_pipeline_without_image_encoder_says_how_to_get_one(bundle, pictures):
    from dataclasses import replace

    with pytest.raises(DataError, match=r"model\.image_encoder=FOLDER"):
        replace(bundle, image_encoder=None).embed_images(pictures)


def test_dtypes_of_their_own(tiny_pipeline):
    bundle = DiffusionBundle.load(str(tiny_pipeline), dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert bundle.unet.dtype == torch.bfloat16
    assert bundle.text_encoder.dtype == torch.bfloat16
    assert bundle.vae.dtype == torch.float32
    assert bundle.schedule.alphas_cumprod.dtype == torch.float32


def test_published_folders_load_without_what_is_not_used(tiny_pipeline, tmp_path):
    """A safety checker is passed over, and a folder with half-precision files alone is found."""
    import json
    import shutil

    folder = shutil.copytree(tiny_pipeline, tmp_path / "published")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("unet", "vae", "text_encoder", "image_encoder"):
        for file in (folder / name).glob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    loaded, plain = DiffusionBundle.load(str(folder)), DiffusionBundle.load(str(tiny_pipeline))
    for name, value in plain.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value)
    assert type(loaded.feature_extractor) is type(plain.feature_extractor)


def test_pickled_weights_are_never_read(tiny_pipeline, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_pipeline, tmp_path / "pickled")
    weights = next((folder / "unet").glob("*.safetensors"))
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(DataError, match="no diffusers pipeline at"):
        DiffusionBundle.load(str(folder))


def test_a_size_of_ones_own(tiny_pipeline):
    bundle = DiffusionBundle.load(str(tiny_pipeline), size=(24, 32))
    assert bundle.size_step == 4
    assert bundle.latent_shape == (4, 12, 16)
    assert bundle.image_size == (24, 32)
    with pytest.raises(DataError, match="multiples of 4 pixels"):
        DiffusionBundle.load(str(tiny_pipeline), size=(24, 30))
