"""ViPer's proxy at tiny size, by the real classes, against the published way of asking it written out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from prefgen.errors import ConfigError
from prefgen.evaluate.scorers import SCORERS, load_scorer
from prefgen.evaluate.viper import ADAPTER, MAX_PAIRS
from prefgen.testing.viper import save_tiny_viper


def pictures(count, *, seed, size=(24, 36)):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(count)]


LIKED, DISLIKED, ASKED = pictures(3, seed=0), pictures(2, seed=1), pictures(2, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_viper(tmp_path_factory.mktemp("viper"))


@pytest.fixture(scope="module")
def viper(folder):
    return load_scorer("viper", weights=folder)


def test_the_score_is_the_published_ratio_after_the_published_prompt(viper):
    scores = viper.score(ASKED, liked=LIKED, disliked=DISLIKED)
    turn = "User:<image>Score for this image?<end_of_utterance>\nAssistant: "
    pair = turn + "-<end_of_utterance>\n" + turn + "+<end_of_utterance>\n"
    plus, minus = viper.processor.tokenizer.convert_tokens_to_ids(["Ġ+", "Ġ-"])
    for asked, score in zip(ASKED, scores, strict=True):
        shown = [DISLIKED[0], LIKED[0], DISLIKED[1], LIKED[1], asked]
        inputs = viper.processor(text=pair * 2 + turn, images=shown, return_tensors="pt")
        assert inputs["pixel_values"].shape[1] == 5
        assert inputs["pixel_values"].shape[-1] == 32  # longest side; the shorter one is enlarged to it too
        with torch.no_grad():
            exps = viper.model(**inputs).logits[:, -1].exp()
        published = exps[:, plus] / (exps[:, plus] + exps[:, minus])
        torch.testing.assert_close(score[None], published)
    assert ((scores > 0) & (scores < 1)).all()
    assert SCORERS["viper"].kind == "history"


def test_the_history_and_the_lora_matter_and_the_longer_side_is_cut(viper):
    scores = viper.score(ASKED, liked=LIKED, disliked=DISLIKED)
    assert float((scores - viper.score(ASKED, liked=DISLIKED, disliked=LIKED)).abs().max()) > 1e-4
    assert torch.equal(scores, viper.score(ASKED, liked=LIKED[:2], disliked=DISLIKED))
    many = pictures(MAX_PAIRS + 1, seed=3)
    some = many[:MAX_PAIRS]
    told = [viper.score(ASKED[:1], liked=one, disliked=one) for one in (many, some)]
    assert torch.equal(*told)
    viper.model.disable_adapters()
    plain = viper.score(ASKED, liked=LIKED, disliked=DISLIKED)
    viper.model.enable_adapters()
    assert float((scores - plain).abs().max()) > 1e-4
    with pytest.raises(ValueError, match="needs a liked and a disliked image"):
        viper.score(ASKED, liked=LIKED, disliked=[])


def test_what_does_not_belong_together_is_refused(folder, tmp_path):
    for path in folder.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(folder)).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / ADAPTER)
    names = [name for name in weights if "layers.0." not in name]
    assert 0 < len(names) < len(weights)
    save_file({name: weights[name] for name in names}, tmp_path / ADAPTER, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"cannot load viper from .*the adapter does not fit"):
        load_scorer("viper", weights=tmp_path)
    (tmp_path / ADAPTER).unlink()
    with pytest.raises(ConfigError, match=r"expected the published adapter .*no adapter_model.safetensors"):
        load_scorer("viper", weights=tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
