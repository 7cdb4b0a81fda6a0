import math

import numpy as np
import pytest
import torch

from prefgen.evaluate import alignment


def _rows(count, width, *, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_hits_by_hand_with_ties():
    candidates = torch.tensor([[0.0], [1.0], [1.0], [5.0]])
    queries = torch.tensor([[0.1], [1.0], [4.0], [5.2]])
    # Query 1 lies on its own text and on user 2's: half a hit. Query 2 at 4 has user 3 nearest, then users 1
    # and 2 at one distance: no hit at depth 1, half a hit at depth 2, a whole one at depth 3.
    assert alignment.own_hits(queries, candidates, depth=1).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert alignment.own_hits(queries, candidates, depth=2).tolist() == [1.0, 1.0, 0.5, 1.0]
    assert alignment.own_hits(queries, candidates, depth=3).tolist() == [1.0] * 4


def test_with_one_text_for_all_retrieval_is_exactly_chance():
    result = alignment.retrieval(_rows(40, 3), torch.ones(40, 3), seed=0)
    assert result.recall_1.mean == pytest.approx(result.chance_1)
    assert result.recall_10.mean == pytest.approx(result.chance_10)


def test_retrieval_of_a_perfect_and_of_a_random_map():
    text = _rows(100, 8)
    perfect = alignment.retrieval(text, text, seed=0)
    assert perfect.recall_1.mean == perfect.recall_10.low == 1.0
    blind = alignment.retrieval(_rows(100, 8, seed=1), text, seed=0)
    assert blind.recall_1.mean < 0.06
    assert blind.chance_1 == 0.01
    assert blind.recall_10.low <= 0.1 <= blind.recall_10.high
    assert blind.recall_10.num_users == 100


def test_bootstrap_interval_matches_the_normal_one():
    values = np.random.default_rng(0).random(400)
    estimate = alignment.bootstrap(values, seed=3)
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.005)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.005)
    assert estimate == alignment.bootstrap(values, seed=3)
    with pytest.raises(ValueError, match="at least one"):
        alignment.bootstrap([], seed=0)


@pytest.mark.parametrize("count", [2, 3, 17])
def test_derangement_moves_everyone_once(count):
    order = alignment.derangement(count, seed=5)
    assert sorted(order) == list(range(count))
    assert all(i != j for i, j in enumerate(order))
    assert order == alignment.derangement(count, seed=5)


def test_derangement_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        alignment.derangement(1, seed=0)


def test_spread_tells_collapse_from_scale():
    rows = _rows(300, 6)
    whole = alignment.spread(rows)
    assert whole.effective_rank == pytest.approx(6, abs=0.2)
    assert alignment.spread(rows * 0.1).distance == pytest.approx(whole.distance * 0.1)
    line = alignment.spread(rows[:, :1] @ _rows(1, 6))
    assert line.effective_rank == pytest.approx(1, abs=1e-6)
    point = alignment.spread(torch.ones(4, 6))
    assert (point.distance, point.effective_rank) == (0.0, 1.0)


def test_neighbourhood_overlap_of_rotation_and_of_noise():
    rows = _rows(80, 6)
    rotation, _ = torch.linalg.qr(_rows(6, 6, seed=2))
    assert alignment.neighbourhood_overlap(rows, rows @ rotation * 3, num_neighbours=8) == 1.0
    noise = alignment.neighbourhood_overlap(rows, _rows(80, 6, seed=3), num_neighbours=8)
    assert noise == pytest.approx(8 / 79, abs=0.05)
    assert alignment.neighbourhood_overlap(rows[:1], rows[:1], num_neighbours=8) == 1.0


def test_separability_of_same_and_of_shifted_clouds():
    first, second = _rows(150, 10), _rows(150, 10, seed=1)
    assert alignment.separability(first, second, seed=0) == pytest.approx(0.5, abs=0.09)
    assert alignment.separability(first, second + 2, seed=0) > 0.97


def test_separability_does_not_profit_from_knowing_the_user():
    # Two copies of one cloud: only a split that tears a user apart could do other than chance or worse.
    rows = _rows(60, 40)
    assert alignment.separability(rows, rows.clone(), seed=0) <= 0.55


def test_readable_attributes_planted_absent_and_constant():
    sem = _rows(300, 12)
    labels = torch.stack([sem[:, 0] > 0, _rows(300, 1, seed=9)[:, 0] > 0, torch.ones(300) > 0], dim=1)
    areas = alignment.readable_attributes(
        sem[:200], labels[:200], queries=sem[200:], query_labels=labels[200:]
    )
    assert areas[0] > 0.95
    assert areas[1] == pytest.approx(0.5, abs=0.15)
    assert math.isnan(areas[2])


def test_ranked_likes_count_pairs_of_a_liked_and_another_attribute():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.2, 0.2, 0.2], [1.0, 2.0, 3.0]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 0], [1, 1, 1]]) > 0
    areas = alignment.ranked_likes(scores, labels=labels)
    assert areas[:3].tolist() == [1.0, 0.0, 0.5]
    assert math.isnan(areas[3])


def test_probe_solved_over_users_is_the_one_solved_over_coordinates():
    train, queries = _rows(20, 35), _rows(9, 35, seed=4)
    labels = (_rows(20, 3, seed=5) > 0).double()
    features, wanted = (rows[:, :-1] for rows in alignment._standard(train, queries))
    gram = features.T @ features + alignment._RIDGE * 20 * torch.eye(35, dtype=torch.float64)
    expected = wanted @ torch.linalg.solve(gram, features.T @ (labels - labels.mean(dim=0)))
    scores = alignment._ridge_scores(train, labels, queries=queries)
    torch.testing.assert_close(scores, expected + labels.mean(dim=0), rtol=1e-9, atol=1e-9)


def test_unequal_numbers_of_rows_are_our_own_mistake():
    with pytest.raises(ValueError, match="equal N"):
        alignment.own_hits(_rows(3, 2), _rows(4, 2), depth=1)
