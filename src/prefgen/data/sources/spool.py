"""Judgements on disk while an import runs: users may arrive in any order, and a killed import goes on.

One sqlite file in the output's temporary folder. What a batch holds and the place to go on from are committed
together, so a place is never ahead of its judgements nor behind them. Memory is sqlite's page cache.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefgen.data.shards import assign_split
from prefgen.data.sources.base import Taste, Unusable, Verdict
from prefgen.data.sources.pictures import Described
from prefgen.errors import DataError
from prefgen.schema import RatedImage, Side, Source, UserHistory

_TABLES = """
CREATE TABLE IF NOT EXISTS users (id INTEGER PRIMARY KEY, user_id TEXT UNIQUE, split TEXT, tastes TEXT);
CREATE TABLE IF NOT EXISTS pictures (id INTEGER PRIMARY KEY, name TEXT UNIQUE, sha256 TEXT, extension TEXT,
    size INTEGER, phash BLOB, colours BLOB, broken TEXT, detail TEXT);
CREATE INDEX IF NOT EXISTS by_content ON pictures (sha256);
CREATE TABLE IF NOT EXISTS judgements (id INTEGER PRIMARY KEY, user INTEGER, verdict TEXT, picture INTEGER,
    prompt TEXT, place TEXT, dropped TEXT);
CREATE TABLE IF NOT EXISTS skipped (reason TEXT PRIMARY KEY, number INTEGER);
CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, bytes INTEGER, sha256 TEXT);
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT);
"""


class Spool:
    """The judgements of one import.

    Attributes:
        sql: the connection, for cleaning steps; commit with :meth:`commit` only.
    """

    def __init__(self, path: Path, *, fractions: tuple[float, float, float]) -> None:
        self._fractions = fractions
        self.sql = sqlite3.connect(path, isolation_level="DEFERRED", timeout=0.5)
        try:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL"):
                self.sql.execute(f"PRAGMA {pragma}")
            self.sql.executescript(_TABLES)
            # Takes the lock now: two imports into one folder would mix.
            self.sql.execute("INSERT OR REPLACE INTO state VALUES ('open', '1')")
            self.sql.commit()
        except sqlite3.OperationalError as error:
            self.sql.close()
            raise DataError(f"{path.parent.parent} is in use by another import ({error})") from None
        except sqlite3.DatabaseError as error:
            self.sql.close()
            raise DataError(
                f"{path}: damaged ({error}); delete {path.parent.parent} and import again"
            ) from None

    def commit(self) -> None:
        """Make everything since the last call lasting, all or nothing."""
        self.sql.commit()

    def close(self) -> None:
        """Close without committing."""
        self.sql.close()

    def get(self, key: str) -> Any:
        """A json value of the import's state; None when it was never put."""
        row = self.sql.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Remember a json value."""
        self.sql.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, json.dumps(value)))

    def count(self, query: str) -> int:
        """The one number that a query gives."""
        return int(self.sql.execute(query).fetchone()[0] or 0)

    def user(self, user_id: str) -> int | None:
        """Number of a user, new or known; None when the schema refuses the id."""
        row = self.sql.execute("SELECT id FROM users WHERE user_id = ?", (user_id,)).fetchone()
        if row is not None:
            return int(row[0])
        try:
            UserHistory.from_json({"user_id": user_id}, where="user")
        except DataError:
            return None
        split = assign_split(user_id, fractions=self._fractions)
        done = self.sql.execute("INSERT INTO users (user_id, split) VALUES (?, ?)", (user_id, split))
        return int(done.lastrowid or 0)

    def picture(self, described: Described) -> int:
        """Number of an image by its content; every one without bytes has a number of its own."""
        row = self.sql.execute(
            "SELECT id FROM pictures WHERE sha256 = ? ORDER BY id LIMIT 1", (described.sha256,)
        ).fetchone()
        if described.sha256 and row is not None:
            return int(row[0])
        done = self.sql.execute(
            "INSERT INTO pictures (sha256, extension, size, phash, colours, broken, detail)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            _columns(described),
        )
        return int(done.lastrowid or 0)

    def promised(self, name: str) -> int:
        """Number of an image that is known by name so far."""
        row = self.sql.execute("SELECT id FROM pictures WHERE name = ?", (name,)).fetchone()
        if row is not None:
            return int(row[0])
        return int(self.sql.execute("INSERT INTO pictures (name) VALUES (?)", (name,)).lastrowid or 0)

    def wanted(self, name: str) -> bool:
        """Whether an image of this name was judged and has not been delivered."""
        query = "SELECT 1 FROM pictures WHERE name = ? AND sha256 IS NULL AND broken IS NULL"
        return self.sql.execute(query, (name,)).fetchone() is not None

    def deliver(self, name: str, *, described: Described) -> None:
        """Fill in what was promised."""
        self.sql.execute(
            "UPDATE pictures SET sha256 = ?, extension = ?, size = ?, phash = ?, colours = ?, broken = ?,"
            " detail = ? WHERE name = ?",
            (*_columns(described), name),
        )

    def judge(self, *, user: int, verdict: Verdict, picture: int, prompt: str, where: str) -> None:
        """Add one judgement."""
        self.sql.execute(
            "INSERT INTO judgements (user, verdict, picture, prompt, place) VALUES (?, ?, ?, ?, ?)",
            (user, verdict, picture, prompt, where),
        )

    def taste(self, taste: Taste) -> None:
        """Add the attributes of a user; one without judgements is left out."""
        text = json.dumps([taste.liked_attributes, taste.disliked_attributes], ensure_ascii=False)
        self.sql.execute("UPDATE users SET tastes = ? WHERE user_id = ?", (text, taste.user_id))

    def skip(self, reason: str, *, number: int) -> None:
        """Count judgements an importer could not use."""
        self.sql.execute(
            "INSERT INTO skipped VALUES (?, ?) ON CONFLICT (reason) DO UPDATE SET number = number + ?",
            (reason, number, number),
        )

    def settle(self) -> None:
        """After reading: images never delivered are missing, and one content has one number."""
        missing = Unusable("missing")
        self.sql.execute(
            "UPDATE pictures SET broken = ?, detail = 'the source holds no such image'"
            " WHERE sha256 IS NULL AND broken IS NULL",
            (missing.reason,),
        )
        self.sql.execute(
            "UPDATE judgements SET picture = (SELECT MIN(same.id) FROM pictures AS mine"
            " JOIN pictures AS same ON same.sha256 = mine.sha256 WHERE mine.id = judgements.picture)"
            " WHERE picture IN (SELECT id FROM pictures WHERE sha256 IS NOT NULL AND name IS NOT NULL)"
        )
        self.sql.execute("CREATE INDEX IF NOT EXISTS by_user ON judgements (user, id)")
        self.sql.execute("CREATE INDEX IF NOT EXISTS by_picture ON judgements (picture)")

    def uncleaned(self) -> None:
        """Take back every cleaning step."""
        self.sql.execute("UPDATE judgements SET dropped = NULL WHERE dropped IS NOT NULL")
        self.sql.execute("DELETE FROM state WHERE key LIKE 'clean %'")

    def digest(self) -> str:
        """SHA-256 over every judgement read, before cleaning: the same source gives the same."""
        digest = hashlib.sha256()
        rows = self.sql.execute(
            "SELECT user_id, verdict, COALESCE(sha256, broken), prompt FROM judgements"
            " JOIN users ON users.id = user JOIN pictures ON pictures.id = picture ORDER BY judgements.id"
        )
        for row in rows:
            digest.update((json.dumps(row, ensure_ascii=False) + "\n").encode())
        return digest.hexdigest()

    def histories(self, *, source: Source) -> Iterator[UserHistory]:
        """What is left of each user who has judgements left, in the order users first came."""
        users = self.sql.execute("SELECT id, user_id, split, tastes FROM users ORDER BY id")
        for number, user_id, split, tastes in users:
            sides: dict[Side, list[RatedImage]] = {"liked": [], "disliked": []}
            for verdict, sha256, extension, prompt in self.sql.execute(
                "SELECT verdict, sha256, extension, prompt FROM judgements"
                " JOIN pictures ON pictures.id = picture"
                " WHERE user = ? AND dropped IS NULL ORDER BY judgements.id",
                (number,),
            ):
                path = f"images/{sha256[:2]}/{sha256}.{extension}"
                sides[verdict].append(RatedImage(image=path, prompt=prompt))
            if sides["liked"] or sides["disliked"]:
                liked_attributes, disliked_attributes = json.loads(tastes or "[[], []]")
                yield UserHistory(
                    user_id=user_id,
                    source=source,
                    liked=tuple(sides["liked"]),
                    disliked=tuple(sides["disliked"]),
                    liked_attributes=tuple(liked_attributes),
                    disliked_attributes=tuple(disliked_attributes),
                    split=split,
                )

    def kept_pictures(self, *, prefix: str) -> Iterable[str]:
        """Hashes of the images still judged that begin with ``prefix``."""
        rows = self.sql.execute(
            "SELECT DISTINCT sha256 FROM pictures WHERE sha256 >= ? AND sha256 < ?"
            " AND EXISTS (SELECT 1 FROM judgements WHERE picture = pictures.id AND dropped IS NULL)",
            (prefix, prefix + "g"),
        )
        return (str(sha256) for (sha256,) in rows)


def _columns(described: Described) -> tuple[Any, ...]:
    return (
        described.sha256 or None,
        described.extension,
        described.size,
        described.phash,
        described.colours,
        described.broken or None,
        described.detail,
    )


@contextmanager
def open_spool(path: Path, *, fractions: tuple[float, float, float]) -> Iterator[Spool]:
    """A spool that is closed whatever happens."""
    spool = Spool(path, fractions=fractions)
    try:
        yield spool
    finally:
        spool.close()
