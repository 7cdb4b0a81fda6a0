import pytest
import torch

from prefgen.errors import DataError
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, Question, pack_batch
from prefgen.testing.mllm import tiny_mllm


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    return MLLM.load(tiny_mllm(tmp_path_factory.mktemp("mllm")))


QUESTIONS = [
    Question(pieces=[5, "Does this user like this image?"], answer="Yes, because of the warm palette"),
    Question(pieces=["What does this user like?"], answer="red, blue"),
    Question(pieces=["Which set?", 6, 7]),
]


def test_rows_hold_history_then_questions_at_one_position(mllm):
    item = PackItem(history=["I like these images.", 0, 1], questions=QUESTIONS)
    batch = pack_batch(mllm.encoder, items=[item])
    history = int((batch.segments == 0).sum())
    for number in (1, 2, 3):
        own = batch.position_ids[0][batch.segments[0] == number]
        assert own[0] == history
        assert torch.equal(own, torch.arange(history, history + len(own)))
    text = mllm.tokenizer.decode(batch.input_ids[0][:history])
    assert text == "<user>I like these images.<image><image>"


def test_mask_shows_history_and_own_question_only(mllm):
    item = PackItem(history=["I like these images.", 0], questions=QUESTIONS[:2])
    batch = pack_batch(mllm.encoder, items=[item, PackItem(history=[1], questions=QUESTIONS[1:2])])
    mask = batch.attention_mask()
    assert mask.dtype == torch.float32
    for row in range(2):
        segments = batch.segments[row].tolist()
        for i, query in enumerate(segments):
            seen = [j for j in range(len(segments)) if mask[row, 0, i, j] == 0]
            expected = [j for j in range(i + 1) if segments[j] in (0, query)]
            assert seen == expected


def test_loss_falls_on_answer_tokens_only(mllm):
    batch = pack_batch(mllm.encoder, items=[PackItem(history=["I like", 0], questions=QUESTIONS)])
    words = [
        mllm.tokenizer.decode(batch.targets[batch.target_questions == question]) for question in range(3)
    ]
    end = "<end_of_utterance>"
    assert words == [f"Yes, because of the warm palette{end}", f"red, blue{end}", ""]
    flat = batch.input_ids.flatten()
    first = [int((batch.target_questions == question).nonzero()[0]) for question in (0, 1)]
    for question, start in enumerate(first):
        assert batch.predictors[start] == batch.reading_points[question]
        assert flat[batch.predictors[start]] == mllm.encoder.text_ids("<assistant>")[-1]
    later = torch.ones(len(batch.targets), dtype=torch.bool)
    later[first] = False
    assert torch.equal(flat[batch.predictors[later] + 1], batch.targets[later])
    labels = batch.labels()
    assert int((labels != -100).sum()) == len(batch.targets)


def test_packed_logits_equal_one_by_one(mllm):
    """Measured difference 2e-7; the tolerance is 5e-6."""
    features = torch.randn(8, 1, mllm.hidden_size, generator=torch.Generator().manual_seed(0))
    items = [
        PackItem(
            history=["I like these images.", 0, 1, 2, "I don't like these images.", 3], questions=QUESTIONS
        ),
        PackItem(history=["I don't like these images.", 4], questions=QUESTIONS[:1]),
        PackItem(history=[], questions=QUESTIONS[1:2]),
    ]
    with torch.no_grad():
        batch = pack_batch(mllm.encoder, items=items)
        together = mllm.logits_at(mllm.hidden(batch, image_features=features), batch.reading_points)
        alone = []
        for item in items:
            for question in item.questions:
                one = pack_batch(mllm.encoder, items=[PackItem(history=item.history, questions=[question])])
                hidden = mllm.hidden(one, image_features=features)
                alone.append(mllm.logits_at(hidden, one.reading_points))
    torch.testing.assert_close(together, torch.cat(alone), atol=5e-6, rtol=0)


def test_boolean_mask_is_silently_wrong_in_eager_attention(tmp_path):
    """Why the mask is additive: transformers adds a boolean one as 0 and 1."""
    mllm = MLLM.load(tiny_mllm(tmp_path), attention="eager")
    item = PackItem(history=["I like these images."], questions=QUESTIONS[1:2] * 2)
    batch = pack_batch(mllm.encoder, items=[item])
    features = torch.zeros(0, 1, mllm.hidden_size)
    with torch.no_grad():
        right = mllm.hidden(batch, image_features=features)
        embeds = mllm.embed(batch, image_features=features)
        visible = batch.attention_mask() == 0
        wrong = mllm.text_model(
            inputs_embeds=embeds, attention_mask=visible, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
    assert (right - wrong).abs().max() > 0.05


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_eager_and_sdpa_agree(mllm, tmp_path, attention):
    other = MLLM.load(tiny_mllm(tmp_path), attention=attention)
    item = PackItem(history=["I like these images.", 0], questions=QUESTIONS[:2])
    batch = pack_batch(mllm.encoder, items=[item])
    features = torch.ones(8, 1, mllm.hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(
            other.hidden(batch, image_features=features), mllm.hidden(batch, image_features=features)
        )


def test_bf16_autocast_stays_finite_with_padding(mllm):
    items = [PackItem(history=[0, 1, 2, 3], questions=QUESTIONS), PackItem(questions=QUESTIONS[1:2])]
    batch = pack_batch(mllm.encoder, items=items)
    features = torch.randn(8, 1, mllm.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(mllm.hidden(batch, image_features=features)).all()


def test_refusals(mllm):
    with pytest.raises(DataError, match="nothing to pack"):
        pack_batch(mllm.encoder, items=[])
    with pytest.raises(DataError, match="allowed are 10"):
        pack_batch(mllm.encoder, items=[PackItem(history=[0] * 40)], max_length=10)
    with pytest.raises(DataError, match="share a first token"):
        mllm.encoder.first_ids(["Yes", "Yes, because"])
