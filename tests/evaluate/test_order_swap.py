"""Wins, ties and flips of a judge asked in both orders, from answers that are known."""

import pytest
import torch

from prefgen.evaluate.order_swap import (
    OrderFlips,
    SwappedWinRate,
    first_chosen,
    order_flips,
    swapped_wins,
)

GIVEN = torch.tensor([2.0, -1.0, 3.0, -0.5, 0.0, 1.0, 0.0])
EXCHANGED = torch.tensor([-1.0, 4.0, 0.1, -2.0, -1.0, 0.0, 0.0])
"""Chosen: one twice, the other twice, the first place twice, the second place twice; then some no choice."""


def test_a_picture_wins_only_where_both_orders_choose_it():
    assert swapped_wins(GIVEN, EXCHANGED).tolist() == [1, 0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert order_flips(GIVEN, EXCHANGED).tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert first_chosen(GIVEN, EXCHANGED).tolist() == [0.5, 0.5, 1, 0, 0.25, 0.75, 0.5]


def test_which_of_the_two_is_called_the_one_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    given, exchanged = torch.randn(2, 200, generator=generator).round(decimals=1)
    turned = swapped_wins(exchanged, given)
    assert torch.equal(swapped_wins(given, exchanged), 1 - turned)
    assert torch.equal(order_flips(given, exchanged), order_flips(exchanged, given))
    assert torch.equal(first_chosen(given, exchanged), first_chosen(exchanged, given))
    assert 0 < float((turned == 1).double().mean()) < 0.5


@pytest.mark.parametrize("place", [1e-30, -4.0])
def test_a_judge_of_places_wins_nothing_for_anybody(place):
    rate, flips = SwappedWinRate(num_resamples=100), OrderFlips(num_resamples=100)
    margins = torch.full((12,), place)
    users = torch.arange(4).repeat_interleave(3)
    for metric in (rate, flips):
        metric.update(margins, margins, users=users)
    assert [float(rate.compute()[name]) for name in ("mean", "low", "high")] == [0.5, 0.5, 0.5]
    assert [float(flips.compute()[name]) for name in ("mean", "low", "high")] == [1, 1, 1]


def test_users_count_alike_however_many_pairs_they_have():
    rate = SwappedWinRate(num_resamples=100)
    rate.update(torch.ones(3), -torch.ones(3), users=torch.zeros(3, dtype=torch.long))
    rate.update(-torch.ones(1), torch.ones(1), users=torch.ones(1, dtype=torch.long))
    assert rate.per_user().tolist() == [1, 0]
    assert rate.estimate().mean == 0.5
