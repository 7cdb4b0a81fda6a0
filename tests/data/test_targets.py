"""Target and e_img are never among the references that describe the user meanwhile."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefgen.data.embeddings import UserEmbeddings
from prefgen.data.targets import choose, usable_draws


def make_embeddings_of(num_liked, num_disliked, references):
    keys = [f"u/liked.{i:03d}" for i in range(num_liked)]
    keys += [f"u/disliked.{i:03d}" for i in range(num_disliked)]
    draws, images = len(references), len(keys)
    blank = np.zeros((draws, 2), dtype=np.float32)
    return UserEmbeddings(
        user_id="u",
        core=blank,
        sem=blank,
        core_negative=blank,
        sem_negative=blank,
        reference_keys=tuple(tuple(keys[i % images] for i in draw) for draw in references),
        image=np.zeros((images, 2), dtype=np.float32),
        image_keys=tuple(keys),
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    num_liked=st.integers(0, 8),
    num_disliked=st.integers(1, 8),
    references=st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=10), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_target_and_anchor_are_liked_distinct_and_outside(num_liked, num_disliked, references, seed):
    embeddings = make_embeddings_of(num_liked, num_disliked, references)
    draws = usable_draws(embeddings)
    for draw in range(len(references)):
        outside = {f"u/liked.{i:03d}" for i in range(num_liked)} - set(embeddings.reference_keys[draw])
        assert (draw in draws) == (len(outside) >= 2)
    if not draws:
        return
    choice = choose(embeddings, draws=draws, rng=np.random.default_rng(seed))
    target, anchor = embeddings.image_keys[choice.target], embeddings.image_keys[choice.anchor]
    assert target != anchor
    for key in (target, anchor):
        assert "/liked." in key
        assert key not in embeddings.reference_keys[choice.draw]


def test_every_outside_picture_has_its_turn_in_both_roles():
    embeddings = make_embeddings_of(5, 2, [[0, 5], [1, 2, 6]])
    rng = np.random.default_rng(0)
    choices = [choose(embeddings, draws=(0, 1), rng=rng) for _ in range(300)]
    assert {c.draw for c in choices} == {0, 1}
    assert {c.target for c in choices} == {c.anchor for c in choices} == {0, 1, 2, 3, 4}
