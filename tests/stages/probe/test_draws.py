from dataclasses import replace

import pytest
import torch

from prefgen.data.reader import ShardReader
from prefgen.errors import DataError
from prefgen.models.questions import UserRows
from prefgen.stages.features import read_users
from prefgen.stages.probe.draws import inter_samples, intra_samples, shuffled
from prefgen.stages.probe.embed import draw_of


@pytest.fixture(scope="module")
def users(inputs):
    reader = ShardReader(inputs / "shards", split="train")
    return tuple(read_users(reader, positions=range(len(reader))))


def images_of(item):
    return {piece for piece in item.history if isinstance(piece, int)}


def test_train_and_test_draws_share_no_image(users):
    """Over all draws of a user, not only draw by draw."""
    options = {"num_references": 5, "seed": 0}
    train = inter_samples(users, part="train", num_draws=10, **options)
    test = inter_samples(users, part="test", num_draws=7, **options)
    for number in range(len(users)):
        seen = [
            set().union(*(images_of(samples.items[i]) for i in (samples.labels == number).nonzero()[:, 0]))
            for samples in (train, test)
        ]
        assert seen[0]
        assert seen[1]
        assert not seen[0] & seen[1]
        own = users[number]
        assert max(*seen[0], *seen[1]) < own.first_row + own.num_images
        assert min(*seen[0], *seen[1]) >= own.first_row


def test_a_target_is_of_the_same_half_and_no_reference(users):
    """Over all draws of a user: images of train and test, targets included, stay apart."""
    options = {"num_references": 5, "seed": 0, "with_target": True}
    seen = {}
    for part in ("train", "test"):
        samples = inter_samples(users, part=part, num_draws=6, **options)
        assert samples.num_places == 2
        assert len(samples.labels) == len(samples.items) == 6 * len(users)
        for number, item in zip(samples.labels.tolist(), samples.items, strict=True):
            plain, asked = item.questions
            (row,) = [piece for piece in asked.pieces if isinstance(piece, int)]
            assert row not in images_of(item)
            assert not [piece for piece in plain.pieces if isinstance(piece, int)]
            seen.setdefault((part, number), set()).update(images_of(item), [row])
    for number in range(len(users)):
        assert not seen["train", number] & seen["test", number]


def test_without_a_target_nothing_is_drawn_differently(users):
    """Fewer references may stand there, since one is kept; the draw itself is the same."""
    options = {"part": "train", "num_draws": 2, "num_references": 3, "seed": 0}
    plain, with_target = (inter_samples(users, with_target=flag, **options) for flag in (False, True))
    assert plain.num_places == 1
    for one, other in zip(plain.items, with_target.items, strict=True):
        assert one.history == other.history
        assert list(one.questions) == list(other.questions)[:1]


def test_a_half_without_an_image_to_spare_is_refused(users):
    history = users[0].history
    few = replace(users[0], history=replace(history, liked=history.liked[:2], disliked=history.disliked[:2]))
    options = {"part": "train", "num_draws": 1, "num_references": 3, "seed": 0}
    assert len(inter_samples([few], **options).items) == 1
    with pytest.raises(
        DataError, match="2 liked and 2 disliked images leaves none .*data.inter_target=false"
    ):
        inter_samples([few], with_target=True, **options)


def test_every_class_has_as_many_samples(users):
    samples = inter_samples(users, part="test", num_draws=4, num_references=2, seed=1)
    assert samples.num_classes == len(users)
    assert torch.equal(samples.labels.bincount(), torch.full((len(users),), 4))


def test_intra_targets_are_no_references_and_labels_are_true(users):
    samples = intra_samples(users, num_references=4, num_queries=6, seed=0)
    labels = iter(samples.labels.tolist())
    for user, item in zip(users, samples.items, strict=True):
        for question in item.questions:
            (row,) = [piece for piece in question.pieces if isinstance(piece, int)]
            assert row not in images_of(item)
            assert question.answer is None
            liked = row - user.first_row < len(user.history.liked)
            assert next(labels) == int(liked)
    assert samples.labels.float().mean() == 0.5


def test_control_keeps_the_labels_and_loses_the_samples():
    labels = torch.arange(10).repeat(20)
    control = shuffled(labels, num_cells=6, seed=0)
    for cell in range(6):
        assert torch.equal(control[:, cell].bincount(), labels.bincount())
        assert (control[:, cell] == labels).float().mean() < 0.25
    assert not torch.equal(control[:, 0], control[:, 1])


def test_disliked_references_left_out_change_nothing_else(users):
    options = {"num_references": 4, "seed": 0}
    for make in (
        lambda sides: intra_samples(users, num_queries=6, sides=sides, **options),
        lambda sides: inter_samples(users, part="train", num_draws=2, sides=sides, **options),
    ):
        both, liked = make("both"), make("liked")
        assert torch.equal(both.labels, liked.labels)
        for user, one, other in zip(
            [users[int(owner)] for owner in both.users[:: len(both.users) // len(both.items)]],
            both.items,
            liked.items,
            strict=True,
        ):
            assert one.questions == other.questions
            first_disliked = user.first_row + len(user.history.liked)
            assert images_of(other) == {row for row in images_of(one) if row < first_disliked}
            assert any(row >= first_disliked for row in images_of(one))
    history = users[0].history
    for number in range(3):
        full = draw_of(history, draw=number, num_references=4, seed=0)
        only = draw_of(history, draw=number, num_references=4, seed=0, sides="liked")
        assert full.disliked
        assert (only.liked, only.disliked) == (full.liked, ())


def test_a_user_who_liked_nothing_keeps_the_disliked_references(users):
    history = replace(users[0].history, liked=())
    draw = draw_of(history, draw=0, num_references=4, seed=0, sides="liked")
    assert len(draw.disliked) == 4
    nobody = UserRows(history=history, first_row=0)
    (item, *_) = inter_samples(
        [nobody], part="train", num_draws=1, num_references=3, seed=0, sides="liked"
    ).items
    assert len(images_of(item)) == 3


def test_a_draw_leaves_targets(users):
    history = users[0].history
    draw = draw_of(history, draw=0, num_references=100, seed=0)
    assert len(draw.liked) == 6
    assert len(draw.disliked) == 6
    assert draw == draw_of(history, draw=0, num_references=100, seed=0)
    assert draw != draw_of(history, draw=1, num_references=100, seed=0)
