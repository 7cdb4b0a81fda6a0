"""What a reader of the true attributes would answer: the ceiling of every like-or-dislike question."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

Words = Sequence[str]


def oracle_scores(
    liked: Sequence[Words],
    *,
    disliked: Sequence[Words],
    queries: Sequence[Words],
    groups: Mapping[str, Words],
    smoothing: float = 0.2,
) -> list[float]:
    """Naive-Bayes log-odds that each query is liked, from the true attributes of a history.

    Args:
        liked: attributes of each liked image.
        disliked: attributes of each disliked image.
        queries: attributes of each image asked about.
        groups: attribute words by group; a word of no group says nothing.
        smoothing: pseudo-count of every value of a group.

    Returns:
        One number a query; positive means liked, zero that the history says nothing.
    """
    odds: dict[str, float] = {}
    counts = [Counter(word for words in side for word in words) for side in (liked, disliked)]
    for words in groups.values():
        totals = [len(side) + smoothing * len(words) for side in (liked, disliked)]
        for word in words:
            rates = [(count[word] + smoothing) / total for count, total in zip(counts, totals, strict=True)]
            odds[word] = math.log(rates[0] / rates[1])
    return [math.fsum(odds.get(word, 0.0) for word in words) for words in queries]
