"""Aspect-ratio buckets: sizes of about equal area, so that photographs need not become squares."""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""(height, width) in pixels."""


def make_buckets(*, size: Size, step: int, max_ratio: float) -> tuple[Size, ...]:
    """The sizes a picture may be trained at.

    Args:
        size: the usual one; always among them, and alone where ``max_ratio`` is 1.
        step: every side is a multiple of it.
        max_ratio: of the long side to the short one, at least 1.

    Returns:
        Sizes in order of height by width, none with more pixels than ``size``, its long side as long as its
        short one allows, lying and standing alike.
    """
    if max_ratio == 1:
        return (size,)
    area = size[0] * size[1]
    found = {size}
    for short in range(step, math.isqrt(area) + 1, step):
        long = area // short // step * step
        if long / short <= max_ratio:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found, key=lambda one: (one[0] / one[1], one)))


def nearest_bucket(size: Size, *, buckets: Sequence[Size]) -> int:
    """Place of the bucket whose shape is nearest to a picture's, by the ratio of the ratios."""
    shape = math.log(size[0] / size[1])
    return min(range(len(buckets)), key=lambda i: abs(math.log(buckets[i][0] / buckets[i][1]) - shape))
