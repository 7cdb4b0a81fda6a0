"""Cleaning in named steps. A step marks judgements as dropped under its name; nothing else is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from prefgen.data.sources.pictures import NearIndex
from prefgen.data.sources.spool import Spool
from prefgen.data.sources.steps import STEPS as STEPS
from prefgen.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Numbers that steps need: bits for near-duplicates, judgements for few-judgements."""

    near_distance: int
    min_judgements: int


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What a step took.

    Attributes:
        step: its name.
        judgements: how many.
        users: users who lost a judgement to it.
        reasons: judgements by finer reason, where a step knows several.
    """

    step: str
    judgements: int
    users: int
    reasons: dict[str, int]


def check_possible(spool: Spool, *, clean: tuple[str, ...]) -> None:
    """Refuse to keep what a history cannot hold.

    Raises:
        DataError: there are ties or broken images, and the step that drops them is switched off.
    """
    refused = {
        "ties": "SELECT place, 'a tie, and histories know liked and disliked only' FROM judgements"
        " WHERE verdict = 'tie' ORDER BY id LIMIT 1",
        "broken-images": "SELECT place, detail FROM judgements JOIN pictures ON pictures.id = picture"
        " WHERE broken IS NOT NULL ORDER BY judgements.id LIMIT 1",
    }
    for step, query in refused.items():
        row = spool.sql.execute(query).fetchone() if step not in clean else None
        if row is not None:
            raise DataError(f"{row[0]}: {row[1]}; mend the source, or add {step} to --clean")


def run_step(spool: Spool, *, step: str, thresholds: Thresholds) -> Removed:
    """Run one step in the open transaction; the caller commits."""
    _RUN[step](spool, thresholds)
    of_step = f"FROM judgements WHERE dropped = '{step}'"
    reasons = {}
    if step == "broken-images":
        reasons = dict(
            spool.sql.execute(
                "SELECT broken, COUNT(*) FROM judgements JOIN pictures ON pictures.id = picture"
                " WHERE dropped = 'broken-images' GROUP BY broken ORDER BY broken"
            )
        )
    return Removed(
        step=step,
        judgements=spool.count(f"SELECT COUNT(*) {of_step}"),
        users=spool.count(f"SELECT COUNT(DISTINCT user) {of_step}"),
        reasons=reasons,
    )


def _ties(spool: Spool, _: Thresholds) -> None:
    spool.sql.execute("UPDATE judgements SET dropped = 'ties' WHERE dropped IS NULL AND verdict = 'tie'")


def _broken_images(spool: Spool, _: Thresholds) -> None:
    spool.sql.execute(
        "UPDATE judgements SET dropped = 'broken-images' WHERE dropped IS NULL"
        " AND picture IN (SELECT id FROM pictures WHERE broken IS NOT NULL)"
    )


def _contradictions(spool: Spool, _: Thresholds) -> None:
    # All of the image's judgements go: which of them the user meant is not ours to guess.
    spool.sql.execute(
        "UPDATE judgements SET dropped = 'contradictions' WHERE dropped IS NULL AND (user, picture) IN"
        " (SELECT user, picture FROM judgements WHERE dropped IS NULL GROUP BY user, picture"
        " HAVING COUNT(DISTINCT verdict) > 1)"
    )


def _exact_duplicates(spool: Spool, _: Thresholds) -> None:
    spool.sql.execute(
        "UPDATE judgements SET dropped = 'exact-duplicates' WHERE dropped IS NULL AND id NOT IN"
        " (SELECT MIN(id) FROM judgements WHERE dropped IS NULL GROUP BY user, verdict, picture)"
    )


def _near_duplicates(spool: Spool, thresholds: Thresholds) -> None:
    rows = spool.sql.execute(
        "SELECT user, verdict, judgements.id, phash, colours FROM judgements"
        " JOIN pictures ON pictures.id = picture WHERE dropped IS NULL ORDER BY user, verdict, judgements.id"
    )
    # One side of one user at a time is in memory; what it drops is written after its rows were read.
    spool.sql.execute("CREATE TEMP TABLE near (id INTEGER PRIMARY KEY)")
    for _, side in groupby(rows, key=itemgetter(0, 1)):
        spool.sql.executemany("INSERT INTO near VALUES (?)", _near(side, distance=thresholds.near_distance))
    spool.sql.execute("UPDATE judgements SET dropped = 'near-duplicates' WHERE id IN (SELECT id FROM near)")
    spool.sql.execute("DROP TABLE near")


def _near(side: Iterator[tuple[int, str, int, bytes, bytes]], *, distance: int) -> list[tuple[int]]:
    index = NearIndex(distance=distance)
    return [(number,) for _, _, number, phash, colours in side if index.add(phash, colours=colours)]


def _across_splits(spool: Spool, _: Thresholds) -> None:
    # Where it occurs most often, so that least is lost; training before validation before test when equal.
    spool.sql.execute(
        "CREATE TEMP TABLE homes AS SELECT picture, split FROM (SELECT picture, split, ROW_NUMBER() OVER"
        " (PARTITION BY picture ORDER BY COUNT(*) DESC,"
        " CASE split WHEN 'train' THEN 0 WHEN 'validation' THEN 1 ELSE 2 END) AS place,"
        " COUNT(*) OVER (PARTITION BY picture) AS splits"
        " FROM judgements JOIN users ON users.id = user WHERE dropped IS NULL GROUP BY picture, split)"
        " WHERE place = 1 AND splits > 1"
    )
    spool.sql.execute("CREATE INDEX temp.by_home ON homes (picture)")
    spool.sql.execute(
        "UPDATE judgements SET dropped = 'across-splits' WHERE dropped IS NULL AND EXISTS"
        " (SELECT 1 FROM homes WHERE homes.picture = judgements.picture"
        " AND homes.split != (SELECT split FROM users WHERE users.id = judgements.user))"
    )
    spool.sql.execute("DROP TABLE homes")


def _few_judgements(spool: Spool, thresholds: Thresholds) -> None:
    spool.sql.execute(
        "UPDATE judgements SET dropped = 'few-judgements' WHERE dropped IS NULL AND user IN"
        " (SELECT user FROM judgements WHERE dropped IS NULL GROUP BY user HAVING COUNT(*) < ?)",
        (thresholds.min_judgements,),
    )


_RUN: dict[str, Callable[[Spool, Thresholds], None]] = {
    "ties": _ties,
    "broken-images": _broken_images,
    "contradictions": _contradictions,
    "exact-duplicates": _exact_duplicates,
    "near-duplicates": _near_duplicates,
    "across-splits": _across_splits,
    "few-judgements": _few_judgements,
}
