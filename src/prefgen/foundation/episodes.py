"""Neutral grouping: two sets of pictures differ in several attributes; to which does this one belong?

The MLLM's last curriculum. Stage 1 asks the same thing in other words about a user's likes and dislikes, and
LoRA finds it only in a trunk that can group at all. The words here are never those of stage 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from prefgen.foundation.captioned import CaptionedImages
from prefgen.models.packing import PackItem, Question
from prefgen.models.prompts import Piece

Wording = tuple[str, str, str, tuple[str, str]]
"""Marker of either set, the query's words, and its two answers."""

WORDINGS: tuple[Wording, ...] = (
    ("Set A:", "Set B:", "Which set?", ("A", "B")),
    ("Left pile:", "Right pile:", "Which pile?", ("left", "right")),
    ("Group one.", "Group two.", "In group one?", ("true", "false")),
    ("Red team here.", "Blue team there.", "Red team?", ("correct", "wrong")),
)
NAMED: tuple[tuple[str, str], ...] = (
    ("Set of the {}:", "Which set?"),
    ("The {} pile.", "Which pile?"),
    ("Team {} here.", "Which team?"),
)
"""Marker of a set with a name drawn anew, and the query; the answer is the name."""

OPPOSED: tuple[Wording, ...] = (
    ("The {} keeps these.", "The {} doesn't keep these.", "Does the {} keep it?", ("true", "false")),
    ("Inside the {} set.", "Outside the {} set.", "Inside?", ("correct", "wrong")),
    ("Take these for {}.", "Never take these for {}.", "Take it?", ("true", "false")),
    ("Good {} here.", "Bad {} here.", "Good or bad?", ("correct", "wrong")),
)
"""Two sets that differ by a denial only, about a name drawn anew."""

SPOKEN: tuple[Wording, ...] = (
    ("I {} these images.", "I don't {} these images.", "Does this user {} this image?", ("true", "false")),
    ("We {} these.", "We don't {} these.", "Do they {} it?", ("correct", "wrong")),
    ("This user will {} these.", "This user won't {} these.", "Will this user {} it?", ("true", "false")),
)
"""As people speak, with a name for a verb: the syntax of stage 1, but neither its verb nor its answers."""

WORDING_SHARES = (0.25, 0.35)
"""Shares of the fixed wordings and of the named ones where names are drawn; the rest is opposed.

With four fixed wordings alone the model learned their very words: LoRA on new ones stayed at chance.
"""

SHARED_WORDS = ("What is common in {}", "What do most images of {} show?")


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How an episode is drawn.

    Attributes:
        min_groups: fewest attribute groups in which the two sets differ.
        max_groups: most such groups.
        num_values: values of a group that each set prefers.
        beta: sharpness of the preference.
        min_images: fewest pictures in a set.
        max_images: most pictures in a set; the two are drawn independently.
        num_queries: pictures asked about.
        copy_rate: share of the queries that stand in the history itself: the easiest match there is.
    """

    min_groups: int
    max_groups: int
    num_values: int = 2
    beta: float = 3.0
    min_images: int = 2
    max_images: int = 8
    num_queries: int = 6
    copy_rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One packed item with what is right about it.

    Attributes:
        item: the two sets, the queries, and a list of what one set has in common.
        answers: the two answers a query can have.
        correct: for each query the index of its answer.
        sides: for each picture, in the order in which they stand, the index of the answer that names its set.
    """

    item: PackItem
    answers: tuple[str, str]
    correct: tuple[int, ...]
    sides: tuple[int, ...]


class PictureIndex:
    """Find a random picture that shows given values in given groups."""

    def __init__(self, data: CaptionedImages) -> None:
        self.labels, self.groups = data.labels()
        self.words = [data.groups[name] for name in self.groups]
        self.sizes = [len(words) for words in self.words]
        self._sorted: dict[tuple[int, ...], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}

    def find(self, groups: Sequence[int], *, values: Sequence[int], rng: np.random.Generator) -> int:
        """A picture with these values; where none has them all, the last groups are given up one by one."""
        for length in range(len(groups), -1, -1):
            subset = tuple(groups[:length])
            codes, order = self._order(subset)
            wanted = 0
            for group, value in zip(subset, values, strict=False):
                wanted = wanted * self.sizes[group] + int(value)
            start, stop = np.searchsorted(codes, (wanted, wanted + 1))
            if stop > start:
                return int(order[int(rng.integers(start, stop))])
        raise AssertionError("the empty subset matches every picture")

    def _order(self, groups: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        if groups not in self._sorted:
            codes = np.zeros(len(self.labels), dtype=np.int64)
            for group in groups:
                codes = codes * self.sizes[group] + self.labels[:, group]
            order = np.argsort(codes, kind="stable")
            self._sorted[groups] = (codes[order], order)
        return self._sorted[groups]


def draw_wording(
    rng: np.random.Generator,
    *,
    names: Sequence[str],
    shares: tuple[float, float] = WORDING_SHARES,
    opposed: Sequence[Wording] = OPPOSED,
) -> Wording:
    """One of the fixed wordings; with names often one that has never been met before."""
    chance = rng.random() if names else 0.0
    if chance < shares[0] or not names:
        return WORDINGS[int(rng.integers(len(WORDINGS)))]
    first, second = (names[int(i)] for i in rng.permutation(len(names))[:2])
    if chance < sum(shares):
        marker, query = NAMED[int(rng.integers(len(NAMED)))]
        # with the space that stands before the name in the marker, so that it is the same token
        return marker.format(first), marker.format(second), query, (f" {first}", f" {second}")
    own, other, query, answers = opposed[int(rng.integers(len(opposed)))]
    return own.format(first), other.format(first), query.format(first), answers


def draw_episode(
    index: PictureIndex,
    *,
    difficulty: Difficulty,
    rng: np.random.Generator,
    names: Sequence[str] = (),
    shares: tuple[float, float] = WORDING_SHARES,
    opposed: Sequence[Wording] = OPPOSED,
) -> Episode:
    """Two sets, queries with their answers, and what one of them has in common, in a newly drawn order.

    Args:
        index: the pictures.
        difficulty: how the sets differ.
        rng: draws everything.
        names: words by which sets may be called; none leaves the fixed wordings alone.
        shares: as :data:`WORDING_SHARES`.
        opposed: the wordings of the rest.
    """
    num_groups = int(rng.integers(difficulty.min_groups, difficulty.max_groups + 1))
    groups = rng.permutation(len(index.groups))[:num_groups].tolist()
    preferred = {g: rng.permutation(index.sizes[g])[: 2 * difficulty.num_values] for g in groups}

    def pictures(side: int, count: int) -> list[int]:
        drawn = np.stack(
            [_values(preferred[g], side, difficulty, index.sizes[g], count=count, rng=rng) for g in groups],
            axis=1,
        )
        return [index.find(groups, values=row, rng=rng) for row in drawn]

    low, high = difficulty.min_images, difficulty.max_images + 1
    sets = [pictures(side, int(rng.integers(low, high))) for side in (0, 1)]
    wording = draw_wording(rng, names=names, shares=shares, opposed=opposed)
    history: list[Piece] = []
    sides: list[int] = []
    for side in rng.permutation(2).tolist():
        history += [(wording[0], wording[1])[side], *sets[side]]
        sides += [side] * len(sets[side])
    questions, correct = [], []
    for side in rng.integers(2, size=difficulty.num_queries).tolist():
        own = sets[side] if rng.random() < difficulty.copy_rate else pictures(side, 1)
        query: list[Piece] = [own[int(rng.integers(len(own)))], wording[2]]
        questions.append(Question(pieces=query, answer=wording[3][side]))
        correct.append(side)
    side = int(rng.integers(2))
    chosen = [(g, v) for g in groups for v in _own(preferred[g], side, difficulty).tolist()]
    words = [index.words[g][v] for g, v in (chosen[i] for i in rng.permutation(len(chosen)))]
    asked = SHARED_WORDS[int(rng.integers(len(SHARED_WORDS)))].format(wording[0] if side == 0 else wording[1])
    questions.append(Question(pieces=[asked], answer=", ".join(words) + "."))
    return Episode(
        item=PackItem(history=history, questions=questions),
        answers=wording[3],
        correct=tuple(correct),
        sides=(*sides, *correct),
    )


def _own(
    preferred: npt.NDArray[np.int64], side: Literal[0, 1] | int, difficulty: Difficulty
) -> npt.NDArray[np.int64]:
    return preferred[: difficulty.num_values] if side == 0 else preferred[difficulty.num_values :]


def _values(
    preferred: npt.NDArray[np.int64],
    side: int,
    difficulty: Difficulty,
    size: int,
    *,
    count: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    weight = np.ones(size)
    weight[_own(preferred, side, difficulty)] = np.exp(difficulty.beta)
    weight[_own(preferred, 1 - side, difficulty)] = np.exp(-difficulty.beta)
    return rng.choice(size, size=count, p=weight / weight.sum())


def caption_item(data: CaptionedImages, row: int, *, feature: int, rng: np.random.Generator) -> PackItem:
    """One picture with a caption and two attribute questions; the words that teach the tower to see."""
    questions = [Question(pieces=["Describe this image."], answer=data.caption(row, rng=rng, bare_rate=0.0))]
    questions.append(Question(pieces=["What is drawn?"], answer=data.prompts[row]))
    words = {
        name: word for name, values in data.groups.items() for word in data.attributes[row] if word in values
    }
    for name in rng.permutation(sorted(words)).tolist()[:3]:
        questions.append(Question(pieces=[f"Which {name}?"], answer=words[name]))
    return PackItem(history=[feature], questions=questions)
