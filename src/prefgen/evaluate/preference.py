"""Who draws what a user likes: win rates over users with intervals, as functions and torchmetrics Metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefgen.evaluate.alignment import Estimate, bootstrap
from prefgen.evaluate.per_user import NUM_RESAMPLES, PerUserMetric


def user_wins(own: NDArray[np.float64], against: NDArray[np.float64]) -> NDArray[np.float64]:
    """(U,) share of a user's pictures with the higher utility, ties half.

    Args:
        own: (U,P) utilities of one condition, a row a user, a column a prompt.
        against: (U,P) of the other, from the same noise.

    Raises:
        ValueError: the shapes differ or are not (U,P).
    """
    if own.shape != against.shape or own.ndim != 2 or own.size == 0:
        raise ValueError(f"expected two (U,P) tables of one shape, got {own.shape} and {against.shape}")
    won: NDArray[np.float64] = ((own > against) + 0.5 * (own == against)).mean(axis=1)
    return won


def win_rate(
    own: NDArray[np.float64],
    against: NDArray[np.float64],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """Mean over users of :func:`user_wins`, with a 95 % bootstrap interval over users.

    A user's pictures resemble each other, so users are resampled and not pictures.
    """
    return bootstrap(user_wins(own, against), seed=seed, draws=num_resamples)


def share_of(
    part: NDArray[np.float64], whole: NDArray[np.float64], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Estimate:
    """Mean of ``part`` as a share of the mean of ``whole``, both (U,) of the same users, resampled together.

    Raises:
        ValueError: the users differ in number, or there are none.
    """
    if part.shape != whole.shape or part.ndim != 1 or part.size == 0:
        raise ValueError(f"expected two (U,) rows of the same users, got {part.shape} and {whole.shape}")
    rows = np.random.default_rng(seed).integers(0, part.size, size=(num_resamples, part.size))
    ratios = part[rows].mean(axis=1) / np.maximum(whole[rows].mean(axis=1), 1e-12)
    low, high = np.quantile(ratios, [0.025, 0.975])
    mean = float(part.mean() / max(float(whole.mean()), 1e-12))
    return Estimate(mean=mean, low=float(low), high=float(high), num_users=int(part.size))


class WinRate(PerUserMetric):
    """:func:`win_rate` fed in batches."""

    def update(self, own: Tensor, against: Tensor, *, users: Tensor) -> None:
        """Add pictures.

        Args:
            own: (B,) utilities of one condition.
            against: (B,) of the other.
            users: (B,) number of each picture's user.
        """
        self.add((own > against).double() + 0.5 * (own == against).double(), users=users)


class UtilityMargin(PerUserMetric):
    """By how much one condition's pictures please their user more than another's, e.g. own against other."""

    def update(self, own: Tensor, against: Tensor, *, users: Tensor) -> None:
        """Add pictures; arguments as for :meth:`WinRate.update`."""
        self.add(own.double() - against.double(), users=users)


class PromptFidelity(PerUserMetric):
    """How often a judge, choosing among the given subjects only, names the prompt's subject.

    Args:
        subjects: the judge's subjects, in the order of its head.
        among: the subjects it may choose from, e.g. those of the evaluation's prompts.
        seed: of the resampling.
        num_resamples: bootstrap draws.

    Raises:
        ValueError: the judge does not know one of ``among``.
    """

    def __init__(
        self,
        *,
        subjects: Sequence[str],
        among: Sequence[str],
        seed: int = 0,
        num_resamples: int = NUM_RESAMPLES,
    ) -> None:
        super().__init__(seed=seed, num_resamples=num_resamples)
        unknown = sorted(set(among) - set(subjects))
        if unknown or not among:
            raise ValueError(f"the judge knows no subject {unknown[0]!r}" if unknown else "no subjects given")
        self.among = tuple(among)
        self.columns = [list(subjects).index(name) for name in among]

    def update(self, probabilities: Tensor, *, prompts: Sequence[str], users: Tensor) -> None:
        """Add pictures: the judge's (B,subjects) probabilities, and what each should show."""
        named = probabilities[:, self.columns].argmax(dim=1).tolist()
        hits = [self.among[column] == prompt for column, prompt in zip(named, prompts, strict=True)]
        self.add(torch.tensor(hits, dtype=torch.float64), users=users)


class AttributeHits(PerUserMetric):
    """How often a picture shows what its user wants, group by group of attributes.

    A picture counts the groups in which its user wants a judged value; a group is hit where the judge's
    likeliest value is a wanted one. Pictures of users who want nothing that is judged are passed over, so
    :meth:`PerUserMetric.user_numbers` may hold fewer users than were given.

    Args:
        groups: attribute words by group, in the order of the judge's heads.
        judged: words the judge reads reliably; others are neither wanted nor hits.
        seed: of the resampling.
        num_resamples: bootstrap draws.
    """

    def __init__(
        self,
        *,
        groups: Mapping[str, Sequence[str]],
        judged: Collection[str],
        seed: int = 0,
        num_resamples: int = NUM_RESAMPLES,
    ) -> None:
        super().__init__(seed=seed, num_resamples=num_resamples)
        self.groups = {name: tuple(words) for name, words in groups.items()}
        self.judged = frozenset(judged)

    def update(
        self, probabilities: Mapping[str, Tensor], *, wanted: Sequence[Sequence[str]], users: Tensor
    ) -> None:
        """Add B pictures.

        Args:
            probabilities: group -> (B,values), e.g. ``Judgement.groups``.
            wanted: the liked (or, to count mistakes, the disliked) attributes of each picture's user.
            users: (B,) number of each picture's user.
        """
        named = {name: probabilities[name].argmax(dim=1).tolist() for name in self.groups}
        kept, values = [], []
        for row, words in enumerate(wanted):
            known = self.judged & set(words)
            asked = {name: own for name, own in self.groups.items() if known & set(own)}
            if asked:
                hits = [own[named[name][row]] in known for name, own in asked.items()]
                values.append(sum(hits) / len(hits))
                kept.append(row)
        self.add(torch.tensor(values, dtype=torch.float64), users=users[kept])
