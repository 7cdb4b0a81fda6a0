"""A blind questionnaire from generated pictures: one HTML file for people, one key for whoever counts.

People see what a user liked and disliked, a prompt and two pictures, and say which one this user would like
better. Which condition a picture comes from stands in the key alone; the page draws anew for each person in
which order the questions come and which picture stands on the left.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prefgen.errors import ConfigError, DataError
from prefgen.evaluate.picture_folder import PictureFolder
from prefgen.lineage import hash_json
from prefgen.schema import SIDES
from prefgen.whole_file import whole_file

TEMPLATE = Path(__file__).resolve().parents[1] / "assets" / "survey.html"
PAGE, KEY = "questionnaire.html", "key.json"
KEY_VERSION = 1
PICTURE_SIDE, HISTORY_SIDE = 512, 192
"""Longest sides in pixels inside the page; smaller pictures stay as they are."""

_LOSSLESS_SIDE = 128

Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One comparison.

    Attributes:
        item: its name in page and answers; says nothing.
        user: whose taste is asked about.
        number: which of the user's prompts.
        a: condition of the picture called a.
        b: condition of the picture called b.
        repeat_of: the item it asks a second time, to see whether a person agrees with themselves; or empty.
    """

    item: str
    user: str
    number: int
    a: str
    b: str
    repeat_of: str = ""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is asked.

    Attributes:
        survey: hash of everything asked; answers carry it.
        questions: in no meaningful order.
        pairs: the comparisons, as they were ordered.
    """

    survey: str
    questions: tuple[Question, ...]
    pairs: tuple[Pair, ...]


def draw_questions(
    folder: PictureFolder, *, pairs: Sequence[Pair], num_questions: int, num_repeats: int, seed: int
) -> Survey:
    """Draw the questions: every pair alike often, every user alike often within a pair.

    Args:
        folder: the pictures.
        pairs: which conditions are compared.
        num_questions: how many are asked, repeats not counted; fewer if there are fewer.
        num_repeats: how many of them come a second time.
        seed: of the drawing.

    Raises:
        ConfigError: a condition that not every user has, a pair of one condition, or numbers that do not fit.
    """
    known = folder.conditions
    for pair in pairs:
        for name in pair:
            if name not in known:
                raise ConfigError(f"no pictures of condition {name!r}; conditions: {', '.join(known)}")
        if pair[0] == pair[1]:
            raise ConfigError(f"a pair needs two conditions, got {pair[0]} twice")
    if not pairs or num_questions < len(pairs) or not 0 <= num_repeats <= num_questions:
        raise ConfigError(
            f"{num_questions} questions with {num_repeats} repeats do not fit {len(pairs)} pairs; ask at "
            "least one question a pair and repeat at most all"
        )
    rng = np.random.default_rng(seed)
    share = [num_questions // len(pairs) + (i < num_questions % len(pairs)) for i in range(len(pairs))]
    drawn = [
        (user, number, pair)
        for pair, count in zip(pairs, share, strict=True)
        for user, number in _spread(folder, count=count, rng=rng)
    ]
    questions = []
    for i, place in enumerate(rng.permutation(len(drawn))):
        user, number, pair = drawn[int(place)]
        a, b = pair if rng.integers(2) else pair[::-1]
        questions.append(Question(item=f"q{i:03d}", user=user, number=number, a=a, b=b))
    for i, place in enumerate(rng.permutation(len(questions))[:num_repeats]):
        first = questions[int(place)]
        questions.append(
            Question(item=f"r{i:03d}", user=first.user, number=first.number, a=first.b, b=first.a,
                     repeat_of=first.item)
        )  # fmt: skip
    record = [asdict(question) for question in questions]
    return Survey(survey=hash_json(record)[:16], questions=tuple(questions), pairs=tuple(pairs))


def _spread(folder: PictureFolder, *, count: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Users in a drawn order, round by round, each time with another prompt."""
    orders = {user.user_id: rng.permutation(len(user.prompts)) for user in folder.users}
    names = [folder.users[int(i)].user_id for i in rng.permutation(len(folder.users))]
    rounds = max(len(order) for order in orders.values())
    cells = [
        (name, int(orders[name][turn]))
        for turn in range(rounds)
        for name in names
        if turn < len(orders[name])
    ]
    return cells[:count]


def write_survey(out: Path, *, survey: Survey, folder: PictureFolder, title: str) -> dict[str, Path]:
    """Write ``questionnaire.html`` and ``key.json``; both or neither.

    Raises:
        DataError: a picture cannot be read.
    """
    content = _content(survey, folder=folder, title=title)
    # "</" inside a script would end it.
    text = json.dumps(content, ensure_ascii=False, sort_keys=True).replace("</", "<\\/")
    page = TEMPLATE.read_text(encoding="utf-8").replace('"PREFGEN_SURVEY"', text)
    key = {
        "version": KEY_VERSION,
        "survey": survey.survey,
        "pairs": [list(pair) for pair in survey.pairs],
        "questions": [asdict(question) for question in survey.questions],
    }
    places = {"questionnaire": out / PAGE, "key": out / KEY}
    with whole_file(places["key"]) as key_part, whole_file(places["questionnaire"]) as page_part:
        page_part.write_text(page, encoding="utf-8")
        key_part.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    return places


def _content(survey: Survey, *, folder: PictureFolder, title: str) -> dict[str, Any]:
    """What the page holds: pictures by number in an order of their own, so that no number tells anything."""
    users = {user.user_id: user for user in folder.users}
    asked = [users[name] for name in sorted({question.user for question in survey.questions})]
    places = {user.user_id: i for i, user in enumerate(asked)}
    files = sorted({users[q.user].pictures[name][q.number] for q in survey.questions for name in (q.a, q.b)})
    order = np.random.default_rng(int(survey.survey, 16)).permutation(len(files))
    number = {files[int(i)]: place for place, i in enumerate(order)}
    return {
        "title": title,
        "survey": survey.survey,
        "attribution": folder.attribution,
        "histories": [
            {
                side: [_uri(folder.root / name, side=HISTORY_SIDE) for name in getattr(user, side)]
                for side in SIDES
            }
            for user in asked
        ],
        "pictures": [_uri(folder.root / files[int(i)], side=PICTURE_SIDE) for i in order],
        "questions": [
            {
                "item": q.item,
                "history": places[q.user],
                "prompt": users[q.user].prompts[q.number],
                "a": number[users[q.user].pictures[q.a][q.number]],
                "b": number[users[q.user].pictures[q.b][q.number]],
                "late": bool(q.repeat_of),
            }
            for q in survey.questions
        ],
    }


def _uri(path: Path, *, side: int) -> str:
    """A picture as a data URI, without any of the file's own metadata."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(image.size) <= _LOSSLESS_SIDE:
        kind = "png"
        image.save(buffer, format="PNG", optimize=True)
    else:
        kind = "jpeg"
        image.save(buffer, format="JPEG", quality=92)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def read_key(path: Path) -> Survey:
    """Read ``key.json``.

    Raises:
        DataError: absent, torn, or of another version.
    """
    try:
        record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] != KEY_VERSION:
            raise DataError(f"{path} has version {record['version']}; this prefgen reads {KEY_VERSION}")
        return Survey(
            survey=str(record["survey"]),
            questions=tuple(Question(**one) for one in record["questions"]),
            pairs=tuple((str(first), str(second)) for first, second in record["pairs"]),
        )
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; pass the folder of 'humans build'") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no key of a questionnaire ({type(error).__name__} {error})") from None
