"""Answers to a questionnaire: read back, checked, and counted."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefgen.errors import DataError
from prefgen.evaluate.agreement import alpha_estimate
from prefgen.evaluate.alignment import bootstrap
from prefgen.evaluate.comparing import compare, corrected
from prefgen.evaluate.questionnaire import Question, Survey
from prefgen.evaluate.strengths import EloRatings

CHOICES = {"a": 1.0, "tie": 0.5, "b": 0.0}
"""What a choice is worth for the picture called a."""

_COLUMNS = ["survey", "respondent", "item", "choice", "left", "seconds"]
_LARGEST_FILE = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One person's word on one question.

    Attributes:
        respondent: who.
        item: the question.
        choice: ``a``, ``b`` or ``tie``.
        left: which of the two stood on the left.
        seconds: how long it took.
    """

    respondent: str
    item: str
    choice: str
    left: str
    seconds: float


def read_answers(path: Path, *, survey: Survey) -> list[Answer]:
    """The answers of one file as the page saves it, JSON or CSV.

    Raises:
        DataError: unreadable, of another questionnaire, an unknown question or choice, or one answered twice.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; at most {_LARGEST_FILE:,}")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text in UTF-8") from None
    rows = _json_rows(text, path=path) if text.lstrip().startswith("{") else _csv_rows(text, path=path)
    items = {question.item for question in survey.questions}
    answers: dict[tuple[str, str], Answer] = {}
    for row in rows:
        if row["survey"] != survey.survey:
            raise DataError(
                f"{path} answers questionnaire {row['survey'][:40]!r}, not {survey.survey}; pass its own key"
            )
        answer = _answer(row, path=path, items=items)
        if (answer.respondent, answer.item) in answers:
            raise DataError(f"{path}: {answer.respondent} answers {answer.item} twice")
        answers[answer.respondent, answer.item] = answer
    if not answers:
        raise DataError(f"{path} holds no answers")
    return list(answers.values())


def _answer(row: dict[str, Any], *, path: Path, items: set[str]) -> Answer:
    if row["item"] not in items:
        raise DataError(f"{path}: unknown question {row['item'][:40]!r}")
    if row["choice"] not in CHOICES or row["left"] not in ("a", "b"):
        raise DataError(
            f"{path}: {row['item']}: choice must be a, b or tie and left a or b, got {row['choice'][:40]!r} "
            f"and {row['left'][:40]!r}"
        )
    try:
        seconds = float(row["seconds"])
    except ValueError:
        raise DataError(f"{path}: {row['item']}: seconds must be a number") from None
    return Answer(
        respondent=row["respondent"],
        item=row["item"],
        choice=row["choice"],
        left=row["left"],
        seconds=seconds,
    )


def _json_rows(text: str, *, path: Path) -> list[dict[str, Any]]:
    try:
        record = json.loads(text)
        if record["prefgen_answers"] != 1:
            raise DataError(f"{path} has version {record['prefgen_answers']}; this prefgen reads 1")
        shared = {name: str(record[name]) for name in ("survey", "respondent")}
        return [{**shared, **{name: str(one[name]) for name in _COLUMNS[2:]}} for one in record["answers"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no answers of a page ({type(error).__name__} {error})") from None


def _csv_rows(text: str, *, path: Path) -> list[dict[str, Any]]:
    # A spreadsheet may have written semicolons.
    first = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=";" if ";" in first else ",")
    if list(reader.fieldnames or []) != _COLUMNS:
        raise DataError(f"{path}: the first line must be {','.join(_COLUMNS)}, got {first[:80]!r}")
    rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise DataError(f"{path} line {number}: expected {len(_COLUMNS)} columns")
    return rows


def gather(files: Sequence[Path], *, survey: Survey) -> list[Answer]:
    """The answers of several files; a person may have only one of them.

    Raises:
        DataError: as :func:`read_answers`, or one name in two files.
    """
    seen: dict[str, Path] = {}
    answers: list[Answer] = []
    for path in files:
        own = read_answers(path, survey=survey)
        for name in dict.fromkeys(answer.respondent for answer in own):
            if name in seen:
                raise DataError(f"{name!r} has answered in {seen[name]} and in {path}; pass one of the two")
            seen[name] = path
        answers += own
    return answers


def human_figures(
    answers: Sequence[Answer], *, survey: Survey, seed: int, num_resamples: int
) -> dict[str, Any]:
    """Win rates, agreement, ratings and what each person did, as plain json.

    A question counts its people's mean, a user the mean of the questions about it, and users are resampled.
    Repeated questions count for a person's agreement with themselves alone.
    """
    questions = {question.item: question for question in survey.questions}
    first_time = [answer for answer in answers if not questions[answer.item].repeat_of]
    people = list(dict.fromkeys(answer.respondent for answer in answers))
    figures: dict[str, Any] = {
        "survey": survey.survey,
        "num_people": len(people),
        "num_answers": len(first_time),
        "pairs": _pair_figures(
            first_time, survey=survey, questions=questions, seed=seed, num_resamples=num_resamples
        ),
        "people": {name: _person(name, answers=answers, questions=questions) for name in people},
    }
    agreement = alpha_estimate(_table(first_time, people=people), seed=seed)
    figures["krippendorff_alpha"] = None if agreement is None else asdict(agreement)
    sides = [answer.choice == answer.left for answer in answers if answer.choice != "tie"]
    figures["left_chosen"] = float(np.mean(sides)) if sides else None
    ratings = _ratings(first_time, survey=survey, questions=questions, seed=seed)
    figures["elo"] = {name: asdict(found) for name, found in ratings.items()} if ratings else None
    return figures


def _pair_figures(
    answers: Sequence[Answer],
    *,
    survey: Survey,
    questions: dict[str, Question],
    seed: int,
    num_resamples: int,
) -> dict[str, Any]:
    found, rates = {}, {}
    for first, second in survey.pairs:
        by_user = _by_user(answers, pair=(first, second), questions=questions)
        if not by_user.size:
            continue
        name = f"{first}_vs_{second}"
        rates[name] = bootstrap(by_user, seed=seed, draws=num_resamples)
        found[name] = compare(by_user, np.full(by_user.size, 0.5), seed=seed, num_resamples=num_resamples)
    tests = corrected(found)
    return {
        name: {**asdict(rate), "p": tests[name].p, "p_holm": tests[name].p_holm}
        for name, rate in rates.items()
    }


def _by_user(
    answers: Sequence[Answer], *, pair: tuple[str, str], questions: dict[str, Question]
) -> NDArray[np.float64]:
    """(U,) how often the pair's first condition was chosen, ties half."""
    by_item: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        question = questions[answer.item]
        if {question.a, question.b} == set(pair):
            won = CHOICES[answer.choice]
            by_item[answer.item].append(won if question.a == pair[0] else 1 - won)
    by_user: dict[str, list[float]] = defaultdict(list)
    for item, values in by_item.items():
        by_user[questions[item].user].append(float(np.mean(values)))
    return np.array([np.mean(values) for values in by_user.values()], dtype=np.float64)


def _table(answers: Sequence[Answer], *, people: Sequence[str]) -> NDArray[np.float64]:
    """(people, items) choices as numbers, NaN where there is none."""
    items = list(dict.fromkeys(answer.item for answer in answers))
    table = np.full((len(people), len(items)), np.nan)
    for answer in answers:
        table[people.index(answer.respondent), items.index(answer.item)] = CHOICES[answer.choice]
    return table


def _person(name: str, *, answers: Sequence[Answer], questions: dict[str, Question]) -> dict[str, Any]:
    own = {answer.item: answer for answer in answers if answer.respondent == name}
    # A repeat names its two pictures the other way round.
    again = [
        CHOICES[answer.choice] == 1 - CHOICES[own[questions[item].repeat_of].choice]
        for item, answer in own.items()
        if questions[item].repeat_of in own
    ]
    sides = [answer.choice == answer.left for answer in own.values() if answer.choice != "tie"]
    return {
        "num_answers": len(own),
        "ties": sum(answer.choice == "tie" for answer in own.values()) / len(own),
        "left_chosen": float(np.mean(sides)) if sides else None,
        "same_again": float(np.mean(again)) if again else None,
        "median_seconds": float(np.median([answer.seconds for answer in own.values()])),
    }


def _ratings(
    answers: Sequence[Answer], *, survey: Survey, questions: dict[str, Question], seed: int
) -> dict[str, Any] | None:
    """Elo ratings of the compared conditions; None where they do not hang together."""
    names = list(dict.fromkeys(name for pair in survey.pairs for name in pair))
    if len(names) < 3 or not answers:
        return None
    users = {name: i for i, name in enumerate(dict.fromkeys(q.user for q in survey.questions))}
    metric = EloRatings(conditions=names, seed=seed)
    for answer in answers:
        question = questions[answer.item]
        metric.update(
            question.a,
            question.b,
            won=torch.tensor([CHOICES[answer.choice]]),
            users=torch.tensor([users[question.user]]),
        )
    try:
        return dict(metric.ratings())
    except DataError:
        return None
