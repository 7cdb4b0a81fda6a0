"""Who is drawn for, with what in sight: nothing the profile was made from comes back as evidence."""

import pytest
import torch

from prefgen.errors import DataError
from prefgen.schema import image_key
from prefgen.study.users import load_users, prompt_pool

KNOWN = ("a apple", "a boat", "a cup", "a fox", "a submarine", "a tower")


@pytest.fixture
def load(tiny_study):
    def call(**changes):
        settings = {
            "embeddings": tiny_study / "embeddings",
            "pool": prompt_pool(tiny_study / "shards", known=KNOWN),
            "num_users": 5,
            "num_prompts": 2,
            "num_draws": 1,
            "image_size": (16, 16),
            "seed": 0,
        }
        return load_users(tiny_study / "shards", **(settings | changes))

    return call


def test_the_pool_is_what_histories_show_and_the_judge_knows(tiny_study):
    pool = prompt_pool(tiny_study / "shards", known=KNOWN)
    assert pool == tuple(sorted(pool))
    assert "a submarine" not in pool
    with pytest.raises(DataError, match="the judge can name none"):
        prompt_pool(tiny_study / "shards", known=("a submarine",))


def test_references_anchor_and_real_drawings_are_different_images(load):
    for user in load():
        keys = [image_key(user.user_id, "liked", i) for i in range(len(user.history.liked))]
        anchor = user.embeddings.image_keys[user.anchor]
        assert anchor == keys[user.anchor_position]
        assert anchor not in user.references
        shown = {keys[i] for i in user.real}
        assert len(shown) == 2
        assert not shown & {anchor, *user.references}
        assert user.history.liked[user.anchor_position].prompt not in user.prompts
        assert set(user.shown("liked")) == {i for i, key in enumerate(keys) if key in user.references}
        assert user.liked.shape == (12, 3, 16, 16)


def test_draws_depend_on_seed_and_user_alone(load):
    first, fewer, other = load(), load(num_users=2), load(seed=1)
    assert [user.user_id for user in first[:2]] == [user.user_id for user in fewer]
    for a, b in zip(first, fewer, strict=False):
        assert (a.prompts, a.seeds, a.anchor, a.real) == (b.prompts, b.seeds, b.anchor, b.real)
        assert torch.equal(a.liked, b.liked)
    assert [user.seeds for user in first] != [user.seeds for user in other]
    seeds = [seed for user in first for seed in user.seeds]
    assert len(set(seeds)) == len(seeds)


def test_short_histories_fall_back_on_the_references(load):
    [user, *_] = load(num_draws=3, num_prompts=9)
    assert len(user.real) == len(user.prompts) == 9
    assert user.anchor_position not in user.real


def test_one_user_is_too_few(load):
    with pytest.raises(DataError, match="1 test users with a liked image; at least 2"):
        load(num_users=1)
