"""The choose question in both orders, on tiny random models of real classes."""

import numpy as np
import pytest
import torch
from PIL import Image

from prefgen.errors import DataError
from prefgen.models.choosing import choice_margins
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, pack_batch
from prefgen.models.questions import FIRST_SECOND, choose_question, history_pieces
from prefgen.testing.families import SIDE, tiny_family_mllm

HISTORY = history_pieces([0, 1], disliked=[2])
PAIRS = [(3, 4), (5, 6), (4, 6)]


@pytest.fixture(scope="module", params=["idefics3", "qwen3_vl"])
def mllm(request, tmp_path_factory):
    return MLLM.load(tiny_family_mllm(tmp_path_factory.mktemp(request.param), family=request.param))


@pytest.fixture(scope="module")
def features(mllm):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(7)]
    return mllm.encode_images(images)


def test_margins_are_those_of_the_question_asked_by_itself(mllm, features):
    found = choice_margins(mllm, history=HISTORY, pairs=PAIRS, image_features=features)
    expected = []
    for one, other in PAIRS:
        for first, second in ((one, other), (other, one)):
            item = PackItem(history=HISTORY, questions=[choose_question(first, second=second)])
            batch = pack_batch(mllm.encoder, items=[item])
            with torch.no_grad():
                hidden = mllm.hidden(batch, image_features=features)
                logits = mllm.choice_logits(batch, hidden=hidden, answers=FIRST_SECOND)
            expected.append(logits[0, 0] - logits[0, 1])
    torch.testing.assert_close(found, torch.stack(expected).view(3, 2), atol=5e-5, rtol=0)
    assert float((found[:, 0] - found[:, 1]).abs().min()) > 1e-4, "or the pictures would not matter"


def test_the_pair_turned_round_is_the_same_two_questions(mllm, features):
    options = {"history": HISTORY, "image_features": features}
    found = choice_margins(mllm, pairs=PAIRS, **options)
    turned = choice_margins(mllm, pairs=[pair[::-1] for pair in PAIRS], pairs_per_pass=1, **options)
    torch.testing.assert_close(turned.flip(1), found, atol=5e-5, rtol=0)
    same = choice_margins(mllm, pairs=[(3, 3)], **options)
    torch.testing.assert_close(same[:, 0], same[:, 1], atol=5e-5, rtol=0)
    assert choice_margins(mllm, pairs=[], **options).shape == (0, 2)


def test_a_history_beyond_the_models_length_is_refused(mllm, features):
    history = history_pieces([0] * (mllm.max_length // mllm.encoder.format.tokens_per_image), disliked=[])
    with pytest.raises(DataError, match=r"are \d+ tokens, .* built for 1024: show fewer references"):
        choice_margins(mllm, history=history, pairs=PAIRS, image_features=features)
