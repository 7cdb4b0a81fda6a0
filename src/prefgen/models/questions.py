"""What stage 1 asks about a user, in words, and the drawing of it.

A user's images are numbered ``first_row ..``: liked ones in order, then disliked ones; these numbers are the
rows of the cached image features. Every draw takes its generator, so it is a pure function of the caller's
(seed, epoch, user). Query images are never among the references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prefgen.models.packing import PackItem, Question
from prefgen.models.prompts import Piece
from prefgen.schema import Side, UserHistory

QuestionKind = Literal["like", "choose", "likes", "dislikes", "score"]

LIKED_MARK = "I like these images."
DISLIKED_MARK = "I don't like these images."
LIKE_WORDS = "Does this user like this image?"
CHOOSE_WORDS = ("First image:", "Second image:", "Which of these two images would this user choose?")
LIKES_WORDS = "What does this user like?"
DISLIKES_WORDS = "What does this user dislike?"
SCORE_WORDS = "Score for this image?"
YES_NO = ("Yes", "No")
PLUS_MINUS = ("+", "-")
FIRST_SECOND = ("first", "second")


@dataclass(frozen=True, kw_only=True)
class QuestionCounts:
    """How many questions of each kind stand behind one history.

    Attributes:
        like: like-or-dislike queries, half of them liked where there are enough.
        choose: which-of-two queries.
        score: like-or-dislike queries in the form of the earlier system: a score of + or -.
        likes: 0 or 1, what does this user like.
        dislikes: 0 or 1, what does this user dislike.
        max_listed: the longest attribute list; a longer one is cut to a random part of that length.
    """

    like: int = 6
    choose: int = 1
    likes: int = 1
    dislikes: int = 1
    score: int = 0
    max_listed: int = 12


@dataclass(frozen=True, kw_only=True)
class UserRows:
    """A user and the rows of its images: liked ones in order from ``first_row``, then disliked ones."""

    history: UserHistory
    first_row: int = 0

    @property
    def num_images(self) -> int:
        """Images on both sides."""
        return len(self.history.liked) + len(self.history.disliked)

    def rows(self, side: Side, *, positions: Sequence[int]) -> list[int]:
        """Feature rows of some images of one side."""
        start = self.first_row + (0 if side == "liked" else len(self.history.liked))
        return [start + int(position) for position in positions]


@dataclass(frozen=True, kw_only=True)
class AskedItem:
    """A packed item with what is needed to score it.

    Attributes:
        item: history and questions with their answers.
        kinds: the kind of each question.
        correct: for each question the index of the right first word (0 = Yes / first), -1 for lists.
    """

    item: PackItem
    kinds: tuple[QuestionKind, ...]
    correct: tuple[int, ...]


def history_pieces(
    liked: Sequence[int], *, disliked: Sequence[int], disliked_first: bool = False
) -> list[Piece]:
    """Images behind their marker; a side without images leaves its marker out."""
    sides: list[tuple[str, Sequence[int]]] = [(LIKED_MARK, liked), (DISLIKED_MARK, disliked)]
    if disliked_first:
        sides.reverse()
    pieces: list[Piece] = []
    for mark, rows in sides:
        if len(rows):
            pieces += [mark, *(int(row) for row in rows)]
    return pieces


def like_question(image: int, *, liked: bool | None = None, reasons: Sequence[str] = ()) -> Question:
    """Like or dislike, with the reason in attributes; ``liked`` None leaves the answer open."""
    answer = None if liked is None else YES_NO[0 if liked else 1]
    if answer and reasons:
        answer += f", because of the {', '.join(reasons)}."
    return Question(pieces=[image, LIKE_WORDS], answer=answer)


def score_question(image: int, *, liked: bool | None = None) -> Question:
    """Like or dislike as a score; ``liked`` None leaves the answer open."""
    return Question(
        pieces=[image, SCORE_WORDS], answer=None if liked is None else PLUS_MINUS[0 if liked else 1]
    )


def choose_question(first: int, *, second: int, answer: int | None = None) -> Question:
    """Which of two; ``answer`` 0 or 1."""
    words = None if answer is None else FIRST_SECOND[answer]
    return Question(
        pieces=[CHOOSE_WORDS[0], first, CHOOSE_WORDS[1], second, CHOOSE_WORDS[2]],
        answer=words,
    )


def list_question(kind: Literal["likes", "dislikes"], *, attributes: Sequence[str] | None = None) -> Question:
    """What this user likes or dislikes, as a comma list in the order given."""
    words = LIKES_WORDS if kind == "likes" else DISLIKES_WORDS
    return Question(pieces=[words], answer=None if attributes is None else ", ".join(attributes) + ".")


def parse_attributes(text: str) -> tuple[str, ...]:
    """The attributes of a generated list, each once, in order."""
    parts = (part.strip().rstrip(".").strip() for part in text.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def draw_item(
    user: UserRows,
    *,
    liked: Sequence[int],
    disliked: Sequence[int],
    counts: QuestionCounts,
    rng: np.random.Generator,
) -> AskedItem:
    """Questions behind the references given, with answers drawn in a new order each time.

    Args:
        user: the user and its feature rows.
        liked: positions of the liked references within ``history.liked``, in prompt order.
        disliked: likewise.
        counts: how many questions of each kind.
        rng: draws queries, orders and which side stands first.
    """
    history, first_row = user.history, user.first_row
    offset = first_row + len(history.liked)
    pieces = history_pieces(
        user.rows("liked", positions=liked),
        disliked=user.rows("disliked", positions=disliked),
        disliked_first=bool(rng.integers(2)),
    )
    queries = draw_queries(history, liked=liked, disliked=disliked, count=counts.like, rng=rng)
    asked: list[tuple[QuestionKind, Question, int]] = []
    for is_liked, position in queries:
        row = first_row + position if is_liked else offset + position
        reasons = _reasons(history, is_liked=is_liked, position=position, rng=rng)
        question = like_question(row, liked=is_liked, reasons=reasons)
        asked.append(("like", question, 0 if is_liked else 1))
    for good, bad in _pairs(history, liked=liked, disliked=disliked, count=counts.choose, rng=rng):
        answer = int(rng.integers(2))
        first, second = (first_row + good, offset + bad)[:: -1 if answer else 1]
        asked.append(("choose", choose_question(first, second=second, answer=answer), answer))
    asked += _lists(history, counts=counts, rng=rng)
    if counts.score:  # drawn last: the other questions are the same with and without it
        for is_liked, position in draw_queries(
            history, liked=liked, disliked=disliked, count=counts.score, rng=rng
        ):
            row = first_row + position if is_liked else offset + position
            asked.append(("score", score_question(row, liked=is_liked), 0 if is_liked else 1))
    return AskedItem(
        item=PackItem(history=pieces, questions=[question for _, question, _ in asked]),
        kinds=tuple(kind for kind, _, _ in asked),
        correct=tuple(correct for _, _, correct in asked),
    )


def _free(count: int, *, taken: Sequence[int], rng: np.random.Generator) -> list[int]:
    used = set(taken)
    return [int(i) for i in rng.permutation(count) if int(i) not in used]


def draw_queries(
    history: UserHistory,
    *,
    liked: Sequence[int],
    disliked: Sequence[int],
    count: int,
    rng: np.random.Generator,
) -> list[tuple[bool, int]]:
    """(is it liked, position) of ``count`` images that are no references, half of them liked if possible."""
    good = [(True, i) for i in _free(len(history.liked), taken=liked, rng=rng)]
    bad = [(False, i) for i in _free(len(history.disliked), taken=disliked, rng=rng)]
    half = count // 2 + (count % 2 and int(rng.integers(2)))
    num_good = min(len(good), max(half, count - len(bad)))
    chosen = good[:num_good] + bad[: count - num_good]
    return [chosen[int(i)] for i in rng.permutation(len(chosen))]


def _pairs(
    history: UserHistory,
    *,
    liked: Sequence[int],
    disliked: Sequence[int],
    count: int,
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    good = _free(len(history.liked), taken=liked, rng=rng)
    bad = _free(len(history.disliked), taken=disliked, rng=rng)
    return list(zip(good[:count], bad[:count], strict=False))


def _reasons(
    history: UserHistory, *, is_liked: bool, position: int, rng: np.random.Generator
) -> tuple[str, ...]:
    image = (history.liked if is_liked else history.disliked)[position]
    taste = set(history.liked_attributes if is_liked else history.disliked_attributes)
    return _shuffled([name for name in image.attributes if name in taste], rng=rng)


def _lists(
    history: UserHistory, *, counts: QuestionCounts, rng: np.random.Generator
) -> list[tuple[QuestionKind, Question, int]]:
    asked: list[tuple[QuestionKind, Question, int]] = []
    sides: tuple[tuple[Literal["likes", "dislikes"], int, tuple[str, ...]], ...] = (
        ("likes", counts.likes, history.liked_attributes),
        ("dislikes", counts.dislikes, history.disliked_attributes),
    )
    for kind, count, attributes in sides:
        if count and attributes:
            words = _shuffled(attributes, rng=rng)[: counts.max_listed]
            asked.append((kind, list_question(kind, attributes=words), -1))
    return asked


def _shuffled(words: Sequence[str], *, rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(words[int(i)] for i in rng.permutation(len(words)))
