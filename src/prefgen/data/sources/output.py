"""What an import leaves behind: histories, the images they name and no others, and ``import.json``."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefgen import __version__
from prefgen.data.index import parse_json
from prefgen.data.reader import MAX_JSON_BYTES
from prefgen.data.sources.base import Opened
from prefgen.data.sources.spool import Spool
from prefgen.errors import DataError
from prefgen.schema import SCHEMA_VERSION, SPLITS, Source, UserHistory

REPORT_NAME = "import.json"
NUM_SAMPLES = 4
"""Users whose images the data card shows: the first who like something."""


@dataclass(kw_only=True)
class Counts:
    """What was kept.

    Attributes:
        users: written.
        liked: number of users by how many images they like.
        disliked: number of users by how many images they dislike.
        splits: users, liked and disliked images of each split.
    """

    users: int = 0
    liked: Counter[int] = field(default_factory=Counter)
    disliked: Counter[int] = field(default_factory=Counter)
    splits: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, history: UserHistory) -> None:
        """Count one user."""
        self.users += 1
        self.liked[len(history.liked)] += 1
        self.disliked[len(history.disliked)] += 1
        split = self.splits.setdefault(str(history.split), Counter())
        split.update(users=1, liked=len(history.liked), disliked=len(history.disliked))


def finished_report(out: Path, *, request: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a finished import in ``out``; None when there is none yet.

    Raises:
        DataError: ``out`` holds another import, or a history that no import made.
    """
    path = out / REPORT_NAME
    if not path.is_file():
        begun = (out / ".import").exists()
        if not begun and (out / "history.jsonl").exists():
            raise DataError(f"{out} holds a history.jsonl already; pass another --out")
        return None
    report: dict[str, Any] = parse_json(path.read_bytes(), where=str(path), max_bytes=MAX_JSON_BYTES)
    try:
        made: dict[str, Any] = dict(report["request"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: no report of an import; pass another --out") from None
    changed = [key for key in request if made.get(key) != request[key]]
    if changed:
        raise DataError(
            f"{out} holds a finished import that differs in: {', '.join(changed)}; "
            "delete the folder or pass another --out"
        )
    return report


def write_histories(
    histories: Iterable[UserHistory],
    *,
    path: Path,
    out: Path,
    total: int,
    progress: Callable[..., None] | None,
) -> tuple[Counts, list[UserHistory]]:
    """Write one line a user; return counts and the users the card shows.

    Args:
        histories: in the order of the file.
        path: where the lines go.
        out: folder the image paths are relative to.
        total: users read, for the progress.
        progress: see ``ImportProgress``.

    Raises:
        DataError: an image file has gone since it was read, or a line would be too long to be read again.
    """
    counts, samples = Counts(), list[UserHistory]()
    with path.open("w", encoding="utf-8") as lines:
        for history in histories:
            for image in (*history.liked, *history.disliked):
                if not (out / image.image).is_file():
                    raise DataError(f"{out / image.image} has gone; delete {out} and import again")
            line = json.dumps(history.to_json(), ensure_ascii=False, sort_keys=True) + "\n"
            if len(line.encode()) > MAX_JSON_BYTES:
                raise DataError(f"user {history.user_id}: more than {MAX_JSON_BYTES:,} bytes in one line")
            lines.write(line)
            counts.add(history)
            if len(samples) < NUM_SAMPLES and history.liked:
                samples.append(history)
            if progress is not None and counts.users % 100 == 0:
                progress("write", done=counts.users, total=total, note="history.jsonl")
        lines.flush()
        os.fsync(lines.fileno())
    return counts, samples


def remove_others(spool: Spool, *, out: Path) -> None:
    """Delete images that no history names any more; one of 256 folders at a time is in memory."""
    for number in range(256):
        folder = out / "images" / f"{number:02x}"
        if not folder.is_dir():
            continue
        kept = set(spool.kept_pictures(prefix=folder.name))
        for file in folder.iterdir():
            if file.stem not in kept:
                file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def build_report(
    opened: Opened, *, spool: Spool, counts: Counts, removed: list[dict[str, Any]], source: Source
) -> dict[str, Any]:
    """``import.json``: nothing in it depends on when or in how many goes the import ran."""
    request = spool.get("request")
    kept = "FROM pictures WHERE id IN (SELECT picture FROM judgements WHERE dropped IS NULL)"
    return {
        "prefgen": __version__,
        "schema_version": SCHEMA_VERSION,
        "command": spool.get("command"),
        "request": request,
        "licence": request["licence"],
        "importer": opened.importer,
        "source": source,
        "notes": list(opened.notes),
        "files": [
            {"name": name, "bytes": size, "sha256": sha256}
            for name, size, sha256 in spool.sql.execute("SELECT * FROM files ORDER BY name")
        ],
        "read": {
            "users": spool.count("SELECT COUNT(*) FROM users"),
            "judgements": spool.count("SELECT COUNT(*) FROM judgements"),
            "sha256": spool.digest(),
        },
        "skipped": dict(spool.sql.execute("SELECT reason, number FROM skipped ORDER BY reason")),
        "cleaning": removed,
        "kept": {
            "users": counts.users,
            "liked": sum(size * users for size, users in counts.liked.items()),
            "disliked": sum(size * users for size, users in counts.disliked.items()),
            "images": spool.count(f"SELECT COUNT(*) {kept}"),
            "image_bytes": spool.count(f"SELECT SUM(size) {kept}"),
            "splits": {split: dict(counts.splits[split]) for split in SPLITS if split in counts.splits},
        },
    }
