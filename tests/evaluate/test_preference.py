"""Win rates, shares and prompt fidelity: closed forms, coverage of intervals, batches and ties."""

import numpy as np
import pytest
import torch

from prefgen.evaluate.alignment import bootstrap, derangement
from prefgen.evaluate.preference import PromptFidelity, WinRate, share_of, user_wins, win_rate


def test_ties_count_half_and_prompts_are_averaged_within_a_user():
    own = np.array([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0]])
    against = np.array([[0.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
    assert user_wins(own, against).tolist() == [0.5, 0.75, 0.0]
    found = win_rate(own, against, seed=0)
    assert found.mean == pytest.approx(1.25 / 3)
    assert found.num_users == 3
    assert 0.0 <= found.low < found.mean < found.high <= 0.75


def test_a_rate_and_its_mirror_sum_to_one():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 3, (2, 40, 2)).astype(float)
    there, back = win_rate(first, second, seed=3), win_rate(second, first, seed=3)
    assert there.mean + back.mean == pytest.approx(1)
    assert there.low + back.high == pytest.approx(1)


def test_intervals_are_seeded_and_cover():
    """Of 200 intervals over 64 fair coins about 95 % cover one half."""
    rng = np.random.default_rng(1)
    covered = 0
    for number in range(200):
        found = bootstrap(rng.integers(0, 2, 64).astype(float), seed=number, draws=500)
        covered += found.low <= 0.5 <= found.high
    assert 0.90 <= covered / 200 <= 0.99
    values = rng.random(20)
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4).low != bootstrap(values, seed=5).low


def test_the_other_user_is_never_the_own_one():
    for count in (2, 3, 64):
        moved = derangement(count, seed=7)
        assert sorted(moved) == list(range(count))
        assert all(i != other for i, other in enumerate(moved))
        assert moved == derangement(count, seed=7)
    assert derangement(64, seed=7) != derangement(64, seed=8)


def test_shares_resample_users_together():
    whole = np.linspace(0.2, 0.9, 30)
    found = share_of(0.5 * whole, whole, seed=0)
    assert found.mean == pytest.approx(0.5)
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(0.5))  # the same users in both


@pytest.mark.parametrize("shape", [((2, 2), (2, 3)), ((4,), (4,)), ((0, 2), (0, 2))])
def test_tables_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="expected two"):
        user_wins(np.zeros(shape[0]), np.zeros(shape[1]))


def test_the_metric_in_batches_equals_the_function():
    rng = np.random.default_rng(2)
    own, against = rng.integers(0, 3, (2, 10, 3)).astype(float)
    metric = WinRate(seed=5, num_resamples=300)
    users = torch.arange(10).repeat_interleave(3)
    order = torch.from_numpy(rng.permutation(30))
    flat = [torch.from_numpy(rows.ravel())[order] for rows in (own, against)]
    for rows in (slice(0, 7), slice(7, 30)):
        metric.update(flat[0][rows], flat[1][rows], users=users[order][rows])
    expected = win_rate(own, against, seed=5, num_resamples=300)
    assert metric.estimate() == expected
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(
        {"mean": expected.mean, "low": expected.low, "high": expected.high}
    )
    metric.reset()
    assert metric.users == []


def test_fidelity_chooses_among_the_given_subjects_only():
    metric = PromptFidelity(subjects=("a cat", "a dog", "a fox"), among=("a fox", "a cat"))
    # The likeliest subject of the first row is a dog, which is not asked for: then the cat.
    probabilities = torch.tensor([[0.3, 0.6, 0.1], [0.1, 0.2, 0.7], [0.6, 0.0, 0.4]])
    metric.update(probabilities, prompts=["a cat", "a fox", "a fox"], users=torch.tensor([0, 0, 1]))
    assert metric.per_user().tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="no subject 'a cow'"):
        PromptFidelity(subjects=("a cat",), among=("a cow",))
