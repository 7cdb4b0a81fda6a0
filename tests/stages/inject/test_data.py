"""Which pictures an example takes: never one that describes the user meanwhile."""

from functools import partial

import numpy as np
import pytest
import torch

from prefgen.errors import DataError
from prefgen.stages.inject.config import InjectLossConfig
from prefgen.stages.inject.data import InjectData, InjectDataset, InjectUsers, _draw_drops
from prefgen.testing.data import make_shards


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_examples_of_real_shards_keep_the_rule(make_config, cache):
    config = make_config(f"data.cache={cache}")
    dataset = InjectDataset(
        InjectUsers(config, split="train"), seed=0, drops=config.inject, purpose="inject train"
    )
    seen = set()
    for epoch in range(10):
        for index in range(len(dataset)):
            example = dataset.example(index, epoch=epoch)
            used = set(example.references)
            assert example.key not in used
            assert example.anchor_key not in used
            assert example.key != example.anchor_key
            assert example.key.split("/")[0] == example.anchor_key.split("/")[0]
            seen.add(example.key)
    assert len(seen) > 5 * len(dataset), "targets must change from epoch to epoch"


def test_an_example_is_a_pure_function_of_seed_epoch_and_user(make_config):
    config = make_config()
    first, again = (
        InjectDataset(InjectUsers(config, split="train"), seed=0, drops=config.inject, purpose="t")
        for _ in range(2)
    )
    again.example(3, epoch=7)
    for epoch in (0, 1):
        one, two = first.example(2, epoch=epoch), again.example(2, epoch=epoch)
        assert (one.key, one.noise_seed, one.time) == (two.key, two.noise_seed, two.time)
        assert torch.equal(one.keep, two.keep)
    assert first.example(2, epoch=0).noise_seed != first.example(2, epoch=1).noise_seed


def test_prompt_and_picture_belong_together(make_config):
    from prefgen.config import resolve_path
    from prefgen.data.reader import ShardReader

    config = make_config("inject.text_drop_rate=0", "inject.both_drop_rate=0")
    reader = ShardReader(resolve_path(config.data.shards), split="train")
    samples = {sample.user_id: sample for sample in (reader[i] for i in range(len(reader)))}
    dataset = InjectDataset(
        InjectUsers(config, split="train"), seed=0, drops=config.inject, purpose="inject train"
    )
    for index in range(len(dataset)):
        example = dataset.example(index, epoch=0)
        user, _, member = example.key.partition("/")
        position = int(member.removeprefix("liked."))
        assert example.picture == samples[user].liked[position]
        assert example.prompt == samples[user].history.liked[position].prompt


def test_drops_come_at_their_rates():
    drops = InjectLossConfig(user_drop_rate=0.1, text_drop_rate=0.2, both_drop_rate=0.15, part_drop_rate=0.3)
    drawn = [_draw_drops(drops, rng=np.random.default_rng(seed)) for seed in range(8000)]
    users = np.array([bool(keep.any()) for keep, _ in drawn])
    texts = np.array([text for _, text in drawn])
    parts = np.stack([keep.numpy() for keep, _ in drawn])
    user_dropped = 0.25 + 0.75 * 0.3**3
    assert (~texts).mean() == pytest.approx(0.35, abs=0.02)
    assert (~users).mean() == pytest.approx(user_dropped, abs=0.02)
    assert (~users & ~texts).mean() == pytest.approx(0.15 + 0.2 * 0.3**3, abs=0.02)
    assert (1 - parts.mean(axis=0)) == pytest.approx(np.full(3, 0.25 + 0.75 * 0.3), abs=0.02)
    keep, text = _draw_drops(None, rng=np.random.default_rng(0))
    assert text
    assert bool(keep.all())


def test_validation_covers_the_timesteps_evenly_and_drops_nothing(make_config):
    config = make_config()
    loader = InjectData(config, image_size=(16, 16)).val_dataloader()
    once, again = list(loader), list(loader)
    times = torch.cat([batch.times for batch in once])
    count = len(times)
    assert torch.equal(times, (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    assert all(bool(batch.keep.all()) and all(batch.prompts) for batch in once)
    assert [batch.noise_seeds for batch in once] == [batch.noise_seeds for batch in again]
    assert [batch.keys for batch in once] == [batch.keys for batch in again]


def test_shards_of_other_users_are_refused(make_config, tmp_path):
    few = make_shards(tmp_path, num_users=4, num_liked=8)
    with pytest.raises(DataError, match="is not in"):
        InjectUsers(make_config(f"data.shards={few}"), split="train")


def test_users_without_a_usable_draw_are_refused_with_words(make_config, tmp_path):
    from prefgen.testing.data import make_embeddings

    shards = make_shards(tmp_path, num_users=8, num_liked=2, num_disliked=2)
    embeddings = make_embeddings(tmp_path / "embeddings", num_users=8, num_images=2)
    config = make_config(f"data.shards={shards}", f"data.embeddings={embeddings}")
    with pytest.raises(DataError, match="no train user"):
        InjectUsers(config, split="train")


def test_embeddings_of_more_pictures_than_the_shards_hold_are_refused(make_config, tmp_path):
    shards = make_shards(tmp_path, num_users=28, num_liked=3, num_disliked=2)
    config = make_config(f"data.shards={shards}")
    dataset = InjectDataset(InjectUsers(config, split="train"), seed=0, drops=None, purpose="t")
    with pytest.raises(DataError, match="made from other histories"):
        list(map(partial(dataset.example, epoch=0), range(len(dataset))))
