import itertools
from dataclasses import replace

import pytest
import torch

from prefgen.data.reader import ShardReader
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackItem, pack_batch
from prefgen.models.pooling import pooled_states
from prefgen.models.probes import LayerChoice
from prefgen.stages.features import load_features, read_users
from prefgen.stages.probe.disjoint import PLACES, disjoint_histories, read_histories

OPTIONS = {"count": 3, "num_references": 2, "num_targets": 1, "seed": 0}
CHOICE = LayerChoice(sem_layers=(1, 2, 3, 4), sem_pooling="last", core_layer=3, core_pooling="mean")


@pytest.fixture(scope="module")
def users(inputs):
    reader = ShardReader(inputs / "shards", split="test")
    return tuple(read_users(reader, positions=range(len(reader))))


def rows_of(pieces):
    return [piece for piece in pieces if isinstance(piece, int)]


def images(one):
    asked = [row for question in one.item.questions for row in rows_of(question.pieces)]
    return rows_of(one.item.history), asked


def test_no_image_stands_in_two_histories_nor_twice_in_one(users):
    """9 liked and 8 disliked images: three parts of 3 and 2, a target of each side in every part."""
    for user in users:
        histories = disjoint_histories(user, **OPTIONS)
        assert len(histories) == 3
        everything = list(itertools.chain.from_iterable(part for one in histories for part in images(one)))
        assert len(everything) == len(set(everything))
        assert min(everything) >= user.first_row
        assert max(everything) < user.first_row + user.num_images
        for one in histories:
            assert one.num_references == 3  # 2 liked, 1 disliked
            assert sorted(one.liked) == [False, True]
            first_disliked = user.first_row + len(user.history.liked)
            assert [row < first_disliked for row in images(one)[1]] == list(one.liked)


def test_neither_verdict_comes_first(users):
    firsts = [
        one.liked[0]
        for user in users
        for seed in range(10)
        for one in disjoint_histories(user, **{**OPTIONS, "seed": seed})
    ]
    assert 0.3 < sum(firsts) / len(firsts) < 0.7


def test_a_function_of_seed_and_user(users):
    assert disjoint_histories(users[0], **OPTIONS) == disjoint_histories(users[0], **OPTIONS)
    assert disjoint_histories(users[0], **OPTIONS) != disjoint_histories(users[0], **{**OPTIONS, "seed": 1})


def test_too_few_images_give_nothing_and_an_empty_side_does_not_matter(users):
    assert disjoint_histories(users[0], **{**OPTIONS, "count": 9}) == ()
    history = users[0].history
    short = replace(
        users[0], history=replace(history, liked=history.liked[:2], disliked=history.disliked[:2])
    )
    assert disjoint_histories(short, **{**OPTIONS, "count": 2}) == (), "a reference each and no target"
    one_sided = replace(users[0], history=replace(history, disliked=()))
    histories = disjoint_histories(one_sided, **OPTIONS)
    assert [one.liked for one in histories] == [(True,)] * 3
    assert [one.num_references for one in histories] == [2] * 3


def test_readings_are_those_of_each_question_asked_alone(users, inputs):
    """In one pass with the others the states are those of a prompt of its own; tolerance 1e-4."""
    mllm = MLLM.load(inputs / "mllm")
    features = load_features(mllm, shards=inputs / "shards", split="test", mllm_hash="x", cache=None).features
    cut = [disjoint_histories(user, **OPTIONS) for user in users[:2]]
    found = read_histories(mllm, users=cut, image_features=features, choice=CHOICE, batch_size=2)
    assert found[0].core.shape == (3, 3, mllm.hidden_size)
    assert found[0].sem.shape == (3, 3, 4 * mllm.hidden_size)
    for user, histories in zip(found, cut, strict=True):
        for number, one in enumerate(histories):
            for place, question in enumerate(one.item.questions):
                alone = pack_batch(
                    mllm.encoder, items=[PackItem(history=one.item.history, questions=[question])]
                )
                states = pooled_states(mllm, batch=alone, image_features=features)[0]
                torch.testing.assert_close(user.core[number, place], states[2, 2], atol=1e-4, rtol=0)
                torch.testing.assert_close(user.sem[number, place], states[:, 0].flatten(), atol=1e-4, rtol=0)
        assert user.liked.tolist() == [list(one.liked) for one in histories]
        at = {place: user.at(place, part="core") for place in PLACES}
        assert torch.equal(at["question"], user.core[:, 0])
        assert torch.equal(at["target"], user.core[:, 1])
        torch.testing.assert_close(at["targets"], (user.core[:, 1] + user.core[:, 2]) / 2)
