"""Published sizes without weights: counts, LoRA and hidden states. The smallest of each family by default."""

import pytest

from prefgen.models.families import FAMILY_NAMES
from prefgen.models.real_sizes import measure, published_models

MODELS = {model.name: model for model in published_models()}
EVERY_RUN = (
    "HuggingFaceTB/SmolVLM-256M-Instruct",
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "Qwen/Qwen2.5-VL-7B-Instruct",
)
TOKENS = {"idefics2": 64, "llava_onevision": 27 * 27 + 1, "qwen2_5_vl": 64, "qwen3_vl": 49}


def check(model):
    one = measure(model, rank=8)
    if model.parameters is not None:
        assert one.parameters == model.parameters
    text = model.config["text_config"]
    width, layers = text["hidden_size"], text["num_hidden_layers"]
    assert one.hidden_shapes == ((1, 4, width),) * layers
    assert one.lora_modules == 7 * layers
    heads = text.get("head_dim", width // text["num_attention_heads"])
    queries, keys = text["num_attention_heads"] * heads, text["num_key_value_heads"] * heads
    inner = text["intermediate_size"]
    # rank x (inputs + outputs) of q, o; k, v; gate, up, down
    expected = 8 * layers * (2 * (width + queries) + 2 * (width + keys) + 3 * (width + inner))
    assert one.trainable == expected
    assert one.lora_path.endswith(("text_model.layers", "language_model.layers"))
    assert one.tokens_per_image == TOKENS.get(model.family, one.tokens_per_image)


def test_every_family_is_in_the_table():
    assert {model.family for model in MODELS.values()} == set(FAMILY_NAMES)
    assert all(model.count_source for model in MODELS.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_RUN else pytest.mark.slow) for name in MODELS]
)
def test_parameters_and_lora_targets_of_the_published_size(name):
    check(MODELS[name])
