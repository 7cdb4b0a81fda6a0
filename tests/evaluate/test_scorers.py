"""Scorers of published weights: loaded by the real classes, refused in one line where weights are absent."""

import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from prefgen.errors import ConfigError
from prefgen.evaluate.scorers import SCORERS, find_scorer, load_scorer
from prefgen.models.clip_tokenizer import train_clip_tokenizer

PICTURES = [Image.new("RGB", (20, 16), colour) for colour in ((200, 30, 30), (20, 40, 220))]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_clip_tokenizer(["a red fox", "a blue boat"] * 4, vocab_size=540, max_length=12)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(tokenizer), "max_position_embeddings": 12, **ends},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 16}
    CLIPImageProcessorPil(size=size, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_clip_shaped_scorers_are_a_scaled_cosine(clip_folder, name):
    scorer = load_scorer(name, weights=clip_folder)
    prompts = ["a red fox", "a blue boat"]
    found = scorer.score(PICTURES, prompts=prompts)
    inputs = scorer.processor(PICTURES, return_tensors="pt") | dict(
        scorer.tokenizer(prompts, padding=True, return_tensors="pt")
    )
    with torch.no_grad():
        published = scorer.model(**inputs).logits_per_image.diagonal()
    torch.testing.assert_close(found, published)
    assert SCORERS[name].kind == "prompt"


def test_dino_gives_an_embedding_a_picture(tmp_path):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(tmp_path)
    size = {"height": 14, "width": 14}
    BitImageProcessorPil(size={"shortest_edge": 14}, crop_size=size).save_pretrained(tmp_path)
    embeds = load_scorer("dino", weights=tmp_path).embed(PICTURES)
    assert embeds.shape == (2, 16)
    assert not torch.equal(embeds[0], embeds[1])


def test_what_is_absent_is_named(tmp_path, clip_folder):
    with pytest.raises(ConfigError, match="unknown scorer 'dreamsim'; scorers: dino"):
        find_scorer("dreamsim", weights=tmp_path)
    with pytest.raises(ConfigError, match="no weights of pickscore at .*nothing is downloaded"):
        find_scorer("pickscore", weights=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="needs the package ImageReward"):
        find_scorer("imagereward", weights=tmp_path)
    with pytest.raises(ConfigError, match="cannot load pickscore"):
        load_scorer("pickscore", weights=tmp_path)
