import numpy as np
import pytest
import torch

from prefgen.errors import DataError
from prefgen.models.text import TextSpace, draw_list
from prefgen.testing.diffusion import TINY_TEXT_DIM, save_tiny_pipeline

WORDS = [f"word{i}" for i in range(9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


def _rng(seed=0):
    return np.random.default_rng(seed)


def _count(text):
    return 2 + len(text.split())


def test_orders_differ_and_nothing_is_lost_where_all_fits():
    lists = {draw_list(WORDS, rng=_rng(i), num_tokens=_count, max_tokens=77) for i in range(5)}
    assert len(lists) == 5
    assert all(sorted(text.split(", ")) == sorted(WORDS) for text in lists)


def test_a_subset_fits_exactly_and_each_word_has_its_turn():
    seen = set()
    for seed in range(40):
        chosen = draw_list(WORDS, rng=_rng(seed), num_tokens=_count, max_tokens=6).split(", ")
        assert len(chosen) == 4
        seen.update(chosen)
    assert seen == set(WORDS)


def test_a_word_too_long_for_the_encoder_does_not_stop_the_others():
    words = ["a b c d e f g h i j", "short"]
    assert draw_list(words, rng=_rng(), num_tokens=_count, max_tokens=8) == "short"
    with pytest.raises(DataError, match="no attribute out of 1 fits the text encoder's 8 tokens"):
        draw_list(words[:1], rng=_rng(), num_tokens=_count, max_tokens=8)
    with pytest.raises(DataError, match="out of 0"):
        draw_list([], rng=_rng(), num_tokens=_count, max_tokens=8)


def test_pooled_vector_is_the_encoders_own_whatever_stands_beside_it(folder):
    space = TextSpace.load(folder)
    texts = ["warm palette", "a red fox, flat fill", "warm palette"]
    rows = space.encode(texts, batch_size=2)
    assert rows.shape == (3, TINY_TEXT_DIM) == (3, TextSpace.width(folder))
    assert torch.equal(rows[0], rows[2])
    inputs = space.tokenizer(
        ["warm palette"], padding="max_length", max_length=space.max_tokens, return_tensors="pt"
    )
    full = space.encoder(**inputs).pooler_output[0]
    torch.testing.assert_close(rows[0], full, rtol=0, atol=1e-5)


def test_mean_tokens_ignores_padding(folder):
    space = TextSpace.load(folder, pooling="mean_tokens")
    together = space.encode(["warm palette", "a red fox, warm palette, flat fill"])
    torch.testing.assert_close(together[0], space.encode(["warm palette"])[0], rtol=0, atol=1e-5)


def test_a_long_text_is_refused_not_cut(folder):
    space = TextSpace.load(folder)
    with pytest.raises(DataError, match="for an encoder of 24, never cut silently: 'zebra"):
        space.encode(["zebra " * 30])


def test_a_folder_without_a_pipeline_is_refused(tmp_path, folder):
    with pytest.raises(DataError, match="no diffusers pipeline at .*model_index.json"):
        TextSpace.load(tmp_path)
    with pytest.raises(DataError, match="text_encoder_2 is None, expected one of"):
        TextSpace.load(folder, part="text_encoder_2")
