"""The oracle over words: equal to the world's own, and by hand."""

import math

import numpy as np
import pytest

from prefgen.data.agents.world import (
    ATTRIBUTE_GROUPS,
    NUM_VALUES,
    attribute_names,
)
from prefgen.data.agents.world import oracle_scores as world_scores
from prefgen.evaluate.oracle import oracle_scores


def test_equals_the_oracle_that_chose_the_world():
    rng = np.random.default_rng(0)
    liked, disliked, queries = (
        rng.integers(0, NUM_VALUES, (count, len(ATTRIBUTE_GROUPS))) for count in (8, 5, 20)
    )
    names = [[attribute_names(row) for row in rows] for rows in (liked, disliked, queries)]
    found = oracle_scores(names[0], disliked=names[1], queries=names[2], groups=ATTRIBUTE_GROUPS)
    assert found == pytest.approx(world_scores(liked, disliked, queries).tolist())


def test_by_hand():
    groups = {"palette": ("red", "blue")}
    [red, unknown] = oracle_scores(
        [("red",), ("red",)], disliked=[("blue",)], queries=[("red",), ("odd",)], groups=groups, smoothing=1
    )
    assert red == pytest.approx(math.log((3 / 4) / (1 / 3)))
    assert unknown == 0.0


def test_an_empty_history_says_nothing():
    assert oracle_scores([], disliked=[], queries=[("red",)], groups={"palette": ("red", "blue")}) == [0.0]
