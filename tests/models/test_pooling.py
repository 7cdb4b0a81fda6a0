import pytest
import torch

from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, Question, pack_batch
from prefgen.models.pooling import POOLINGS, pool, pooled_states
from prefgen.testing.mllm import tiny_mllm


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    return MLLM.load(tiny_mllm(tmp_path_factory.mktemp("mllm")))


@pytest.fixture(scope="module")
def batch(mllm):
    like = Question(pieces=[3, "Does this user like this image?"], answer="Yes")
    what = Question(pieces=["What does this user like?"])
    items = [
        PackItem(history=["I like these images.", 0, 1], questions=[like, what]),
        PackItem(history=["I don't like these images.", 2], questions=[what]),
        PackItem(questions=[what]),
    ]
    return pack_batch(mllm.encoder, items=items)


def test_pooling_equals_plain_loops(mllm, batch):
    hidden = torch.randn(*batch.input_ids.shape, 6, generator=torch.Generator().manual_seed(0))
    got = pool(hidden, batch=batch)
    length = hidden.shape[1]
    for question in range(batch.num_questions):
        row, number = int(batch.question_items[question]), int(batch.question_segments[question])
        end = int(batch.reading_points[question]) % length
        seen, images = [], []
        for column in range(end + 1):
            if batch.segments[row, column] in (0, number):
                seen.append(hidden[row, column])
                if batch.input_ids[row, column] == mllm.encoder.image_token_id:
                    images.append(hidden[row, column])
        empty = torch.zeros(6)
        expected = [
            hidden[row, end],
            torch.stack(images).mean(0) if images else empty,
            torch.stack(seen).mean(0),
            torch.stack(seen).max(0).values,
        ]
        torch.testing.assert_close(got[question], torch.stack(expected))


def test_hooks_see_what_transformers_reports(mllm, batch):
    features = torch.randn(4, 1, mllm.hidden_size, generator=torch.Generator().manual_seed(1))
    pooled = pooled_states(mllm, batch=batch, image_features=features)
    assert pooled.shape == (4, mllm.num_layers, len(POOLINGS), mllm.hidden_size)
    with torch.no_grad():
        states = mllm.text_model(
            inputs_embeds=mllm.embed(batch, image_features=features),
            attention_mask=batch.attention_mask(),
            position_ids=batch.position_ids,
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
    # the last one that transformers reports is after the final norm, ours before
    for layer in range(1, mllm.num_layers):
        torch.testing.assert_close(pooled[:, layer - 1], pool(states[layer], batch=batch))
    some = pooled_states(mllm, batch=batch, image_features=features, layers=[3, 1], poolings=["max"])
    assert torch.equal(some[:, :, 0], pooled[:, [2, 0], POOLINGS.index("max")])


def test_no_hook_stays_behind(mllm, batch):
    def hooks():
        return [len(layer._forward_hooks) for layer in mllm.text_model.layers]

    before = hooks()
    pooled_states(mllm, batch=batch, image_features=torch.zeros(4, 1, mllm.hidden_size))
    assert hooks() == before


def test_answers_do_not_leak_into_the_states(mllm, batch):
    """The states read before an answer are the same whatever the answer is."""
    features = torch.ones(4, 1, mllm.hidden_size)

    def states(answer):
        like = Question(pieces=[3, "Does this user like this image?"], answer=answer)
        item = PackItem(history=["I like these images.", 0], questions=[like])
        return pooled_states(mllm, batch=pack_batch(mllm.encoder, items=[item]), image_features=features)

    torch.testing.assert_close(states("Yes"), states("No, because of red"))
