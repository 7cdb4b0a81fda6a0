"""Batches by tokens instead of by count, for samples of unequal length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefgen.data.sampling import rng_for
from prefgen.errors import DataError

WINDOW_BATCHES = 8
"""Samples of so many full batches are sorted by length among themselves; the order else stays random."""


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """Cuts an epoch's order into batches that hold at most so many tokens, padding included.

    A pure function of its fields, the order and the epoch, so that a run resumes exactly.

    Attributes:
        length: (position, epoch) -> tokens of a sample.
        max_tokens: of one batch: its longest sample times its samples.
        max_samples: of one batch.
        seed: of the order of the batches.
        key: the setting that max_tokens comes from, for messages.
    """

    length: Callable[[int, int], int]
    max_tokens: int
    max_samples: int
    seed: int
    key: str = "max_tokens"

    def __call__(self, order: Sequence[int], *, epoch: int) -> list[list[int]]:
        """Batches of positions; each position of ``order`` stands in exactly one.

        Raises:
            DataError: a sample alone is longer than a batch may be.
        """
        batches: list[list[int]] = []
        window = WINDOW_BATCHES * self.max_samples
        for start in range(0, len(order), window):
            lengths = {int(one): self.length(int(one), epoch) for one in order[start : start + window]}
            batch: list[int] = []
            for one in sorted(lengths, key=lambda one: lengths[one]):
                if lengths[one] > self.max_tokens:
                    raise DataError(
                        f"a sample has {lengths[one]} tokens, but {self.key}={self.max_tokens}; raise it, or "
                        "use fewer references or questions"
                    )
                # sorted, so the newest is the longest
                if len(batch) == self.max_samples or lengths[one] * (len(batch) + 1) > self.max_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(one)
            batches.append(batch)
        rng = rng_for(seed=self.seed, epoch=epoch, key="batches", purpose="shuffle")
        return [batches[int(i)] for i in rng.permutation(len(batches))]
