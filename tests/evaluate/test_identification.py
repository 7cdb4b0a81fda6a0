import itertools

import numpy as np
import pytest
import torch

from prefgen.evaluate.identification import accuracy_among, group_sizes, identification


def lots(scores, *, size):
    """Every group of N that holds the own user; equals draw lots."""
    count = len(scores)
    found = []
    for user in range(count):
        others = [other for other in range(count) if other != user]
        shares = []
        for group in itertools.combinations(others, size - 1):
            rivals = scores[user, list(group)]
            own = scores[user, user]
            shares.append(0.0 if (rivals > own).any() else 1 / (1 + int((rivals == own).sum())))
        found.append(np.mean(shares))
    return np.array(found)


@pytest.mark.parametrize("ties", [False, True])
def test_accuracy_among_n_is_the_mean_over_every_group(ties):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(7, 7, generator=generator)
    if ties:
        scores = (scores * 3).round()
    found = accuracy_among(scores, sizes=(1, 2, 3, 5, 7))
    for size, values in found.items():
        np.testing.assert_allclose(values, lots(scores, size=size), atol=1e-12)


def test_sizes_double_up_to_all():
    assert group_sizes(2) == (2,)
    assert group_sizes(9) == (2, 4, 8, 9)
    assert group_sizes(16) == (2, 4, 8, 16)


def users(*, noise, count=20, histories=4, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, 1, dim, generator=generator)
    return centres + noise * torch.randn(count, histories, dim, generator=generator)


def test_clear_users_are_named_and_equal_ones_are_named_by_chance():
    clear = identification(users(noise=0.01), num_enrolled=1, seed=0, num_resamples=20)
    assert {size: one.mean for size, one in clear.items()} == {2: 1, 4: 1, 8: 1, 16: 1, 20: 1}
    same = identification(torch.ones(20, 4, 3), num_enrolled=2, seed=0, num_resamples=20)
    for size, one in same.items():
        assert one.mean == pytest.approx(1 / size)
        assert one.num_users == 20


def test_more_users_make_it_harder_and_more_histories_easier():
    draws = users(noise=1.5, count=40)
    few, many = (
        identification(draws, num_enrolled=enrolled, seed=0, num_resamples=50) for enrolled in (1, 3)
    )
    means = [one.mean for one in few.values()]
    assert means == sorted(means, reverse=True)
    assert means[0] > means[-1] + 0.2
    assert many[40].mean > few[40].mean + 0.1
    assert few[40].low < few[40].mean < few[40].high


def test_users_without_anything_of_their_own_are_at_chance():
    draws = torch.randn(60, 3, 8, generator=torch.Generator().manual_seed(5))
    found = identification(draws, num_enrolled=2, seed=0)
    assert found[2].low < 0.5 < found[2].high
    assert found[60].mean < 0.06


def test_scale_of_a_coordinate_does_not_decide():
    draws = users(noise=0.5)
    blown = draws.clone()
    blown[..., 0] *= 1e4
    first, second = (identification(one, num_enrolled=2, seed=0)[20].mean for one in (draws, blown))
    assert first == pytest.approx(second)


@pytest.mark.parametrize(("shape", "enrolled"), [((1, 3, 2), 1), ((4, 3, 2), 3), ((4, 3, 2), 0)])
def test_refusals(shape, enrolled):
    with pytest.raises(ValueError, match="cannot name one of"):
        identification(torch.zeros(shape), num_enrolled=enrolled, seed=0)
    with pytest.raises(ValueError, match="sizes of 1 to U"):
        accuracy_among(torch.zeros(3, 3), sizes=(4,))
