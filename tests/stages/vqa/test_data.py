import pytest
import torch

from prefgen.data.reader import ShardReader
from prefgen.models.mllm import MLLM
from prefgen.models.packing import PackedBatch
from prefgen.models.questions import DISLIKED_MARK, QuestionCounts
from prefgen.stages.features import load_features, read_users, user_images
from prefgen.stages.vqa.data import DrawRules, PixelSource, VQACollate, VQADataset


@pytest.fixture(scope="module")
def mllm(inputs):
    return MLLM.load(inputs / "mllm")


@pytest.fixture(scope="module")
def reader(inputs):
    return ShardReader(inputs / "shards", split="train")


@pytest.fixture(scope="module")
def users(reader):
    return tuple(read_users(reader, positions=range(len(reader))))


def dataset(users, *, empty_side_rate=0.0, num_liked=(1, 4), num_disliked=(1, 4), dislikes=1, seed=0):
    rules = DrawRules(
        purpose="train",
        num_liked=num_liked,
        num_disliked=num_disliked,
        empty_side_rate=empty_side_rate,
        counts=QuestionCounts(like=4, dislikes=dislikes),
    )
    return VQADataset(users, rules=rules, seed=seed)


def test_examples_are_pure_functions_of_seed_epoch_and_user(users):
    one, again = dataset(users), dataset(users)
    assert one.example(3, epoch=2) == again.example(3, epoch=2)
    assert one.example(3, epoch=2) != one.example(3, epoch=3)
    assert one.example(3, epoch=2) != dataset(users, seed=1).example(3, epoch=2)


def test_reference_counts_differ_and_stay_in_their_ranges(users):
    drawn = [dataset(users).references(0, epoch=epoch) for epoch in range(100)]
    counts = {(len(one.liked), len(one.disliked)) for one in drawn}
    assert {liked for liked, _ in counts} == {disliked for _, disliked in counts} == {1, 2, 3, 4}
    assert any(liked != disliked for liked, disliked in counts)
    all_of_them = dataset(users, num_liked=(50, 50)).references(0, epoch=0)
    assert len(all_of_them.liked) == 6, "one of seven is kept for a query"


def test_either_side_may_be_empty(users):
    drawn = [dataset(users, empty_side_rate=0.5).references(0, epoch=epoch) for epoch in range(100)]
    assert 30 < sum(not one.liked or not one.disliked for one in drawn) < 70
    assert any(not one.liked for one in drawn)
    assert any(not one.disliked for one in drawn)
    assert all(one.liked or one.disliked for one in drawn)


def test_histories_without_disliked_images_still_ask_about_them(users):
    """The study's arm without dislikes: data.num_disliked=[0,0] questions.dislikes=0."""
    data = dataset(users, num_disliked=(0, 0), dislikes=0, empty_side_rate=0.5)
    for index, user in enumerate(users):
        _, asked = data.example(index, epoch=0)
        first_disliked = user.first_row + len(user.history.liked)
        shown = [piece for piece in asked.item.history if isinstance(piece, int)]
        assert shown
        assert max(shown) < first_disliked
        assert DISLIKED_MARK not in asked.item.history
        assert "dislikes" not in asked.kinds
        answers = [right for kind, right in zip(asked.kinds, asked.correct, strict=True) if kind == "like"]
        assert sorted(answers) == [0, 0, 1, 1]


def test_query_images_are_no_references(users):
    data = dataset(users)
    for index in range(len(data)):
        _, asked = data.example(index, epoch=0)
        references = {piece for piece in asked.item.history if isinstance(piece, int)}
        for question in asked.item.questions:
            assert not references & {piece for piece in question.pieces if isinstance(piece, int)}


def test_uncached_images_give_the_same_features(mllm, reader, users):
    """data.cache_features=none hands pixels over; each image of a batch stands in it once."""
    examples = [dataset(users).example(index, epoch=0) for index in range(3)]
    cached = VQACollate(mllm.encoder, max_length=512, pixels=None)(examples)
    source = PixelSource(reader, users=users, mllm=mllm)
    fresh = VQACollate(mllm.encoder, max_length=512, pixels=source)(examples)
    rows = cached.packed.image_rows
    assert fresh.pixels.shape[0] == len(set(rows.tolist()))
    pictures = [image for index in range(3) for image in user_images(reader[index])]
    torch.testing.assert_close(
        mllm.encode_images(pictures)[rows],
        mllm.encode_images(fresh.pixels)[fresh.packed.image_rows],
        atol=1e-5,
        rtol=1e-4,
    )
    assert isinstance(cached.to("cpu").packed, PackedBatch)


def test_features_are_cached_until_model_or_shards_change(mllm, inputs, tmp_path, monkeypatch):
    def load(mllm_hash="aa"):
        return load_features(
            mllm, shards=inputs / "shards", split="train", mllm_hash=mllm_hash, cache=tmp_path
        )

    first = load()
    assert first.features.dtype == torch.float16
    assert len(first.features) == sum(user.num_images for user in first.users)
    calls = []
    encode = mllm.encode_images
    monkeypatch.setattr(mllm, "encode_images", lambda images: calls.append(1) or encode(images))
    assert torch.equal(load().features, first.features)
    assert not calls
    load("bb")
    assert calls
    calls.clear()
    (tmp_path / "train.safetensors").write_bytes(b"torn")
    assert torch.equal(load("bb").features, first.features)
    assert calls
