"""A judge that chooses between two pictures, asked twice with their places exchanged.

A judge may prefer a place instead of a picture. Asked in both orders, such a judge names both pictures once,
which counts as a tie: by its bias alone nobody wins. Margins are the judge's score of the picture that stands
FIRST minus that of the second; above 0 the first is chosen, below 0 the second, and 0 is no choice.
"""

from __future__ import annotations

from torch import Tensor

from prefgen.evaluate.per_user import PerUserMetric


def swapped_wins(given: Tensor, exchanged: Tensor) -> Tensor:
    """(B,) float64: 1 where one picture is chosen in both orders, 0 where the other is, else .5.

    Args:
        given: (B,) margins with the one picture first.
        exchanged: (B,) margins with the other picture first.
    """
    one = (given > 0) & (exchanged < 0)
    other = (given < 0) & (exchanged > 0)
    wins: Tensor = 0.5 + 0.5 * (one.double() - other.double())
    return wins


def order_flips(given: Tensor, exchanged: Tensor) -> Tensor:
    """(B,) float64: 1 where the same place is chosen in both orders, so that the picture changes."""
    flips: Tensor = ((given.sign() * exchanged.sign()) > 0).double()
    return flips


def first_chosen(given: Tensor, exchanged: Tensor) -> Tensor:
    """(B,) float64: share of the two answers that name the first place, no choice half; .5 has no bias."""
    share: Tensor = 0.5 + 0.25 * (given.sign() + exchanged.sign()).double()
    return share


class SwappedWinRate(PerUserMetric):
    """:func:`swapped_wins`, averaged within a user, then over users."""

    def update(self, given: Tensor, exchanged: Tensor, *, users: Tensor) -> None:
        """Add (B,) margins in both orders with the (B,) number of each pair's user."""
        self.add(swapped_wins(given, exchanged), users=users)


class OrderFlips(PerUserMetric):
    """:func:`order_flips`, likewise: 0 is a judge of pictures, 1 a judge of places."""

    higher_is_better = False

    def update(self, given: Tensor, exchanged: Tensor, *, users: Tensor) -> None:
        """Add (B,) margins in both orders with the (B,) number of each pair's user."""
        self.add(order_flips(given, exchanged), users=users)
