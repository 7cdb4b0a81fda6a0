"""Profiles of all users of a split of history shards: one file each and an index; resumable."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from prefgen.data.index import INDEX_NAME
from prefgen.data.reader import ShardReader, UserSample, decode_image
from prefgen.errors import CheckpointError, DataError
from prefgen.lineage import hash_file
from prefgen.profile import UserProfile
from prefgen.schema import Side, Split
from prefgen.taste import TasteModels
from prefgen.whole_file import write_json

PROFILES_INDEX = "profiles.json"
_INDEX_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class BatchEntry:
    """What became of one user.

    Attributes:
        key: of the user's sample in the shards.
        file: name of the profile; None where none could be made.
        liked: liked images.
        disliked: disliked images.
        user_id: only if asked.
        reason: why there is no profile.
    """

    key: str
    file: str | None
    liked: int
    disliked: int
    user_id: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """What was done.

    Attributes:
        built: profiles made now.
        kept: whole ones found there.
        skipped: users without a profile, with the reason.
        index: ``profiles.json``.
    """

    built: int
    kept: int
    skipped: tuple[BatchEntry, ...]
    index: Path


def build_profiles(
    taste: TasteModels,
    *,
    shards: Path,
    split: Split,
    out: Path,
    user_ids: bool = False,
    words: bool = False,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> BatchResult:
    """One profile a user, under a name made from the user_id, and ``profiles.json`` when all are there.

    A file is kept if it is whole, made by these models, from as many images, with or without words as asked.
    A user without a liked image, or whose sample is damaged, is left out and named in the index.

    Args:
        taste: the models.
        shards: history shards.
        split: whose users.
        out: the folder.
        user_ids: store user_id in the files and in the index.
        words: ask the MLLM what each user likes and dislikes.
        seed: of the reference draws.
        progress: called with the number of users just done.

    Raises:
        DataError: no such split, or two users whose names would be the same.
        CheckpointError: a file cannot be written.
    """
    reader = ShardReader(shards, split=split)
    names = _file_names(reader.user_ids)
    counts = {"built": 0, "kept": 0}
    entries: list[BatchEntry] = []
    for position, name in enumerate(names):
        user_id = reader.user_ids[position] if user_ids else None
        entry, done = _one(
            taste,
            reader=reader,
            position=position,
            path=out / name,
            user_id=user_id,
            words=words,
            seed=seed,
        )
        entries.append(entry)
        if done is not None:
            counts[done] += 1
        if progress is not None:
            progress(1)
    index = out / PROFILES_INDEX
    made_from = {"split": split, "shards": hash_file(shards / INDEX_NAME), "lineage": taste.lineage}
    _write_index(index, entries=entries, made_from={**made_from, "seed": seed})
    skipped = tuple(entry for entry in entries if entry.file is None)
    return BatchResult(built=counts["built"], kept=counts["kept"], skipped=skipped, index=index)


def safe_name(user_id: str) -> str:
    """A user_id as the name of a file on any system, without its ending.

    Small letters, digits, - and _ up to 64 stay as they are. Anything else becomes a _, and a hash of the
    whole keeps apart what would otherwise look the same: "Ann" and "ann", where a system ignores case.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", user_id):
        return user_id
    plain = re.sub(r"[^a-z0-9_-]+", "_", user_id.lower())[:48].strip("_-") or "user"
    return f"{plain}-{hashlib.sha256(user_id.encode()).hexdigest()[:12]}"


def _file_names(user_ids: tuple[str, ...]) -> list[str]:
    owners: dict[str, str] = {}
    for user_id in user_ids:
        name = safe_name(user_id)
        if name in owners:
            raise DataError(
                f"users {owners[name][:40]!r} and {user_id[:40]!r} would share the file {name}.safetensors; "
                "rename one in the history and build the shards again"
            )
        owners[name] = user_id
    return [f"{name}.safetensors" for name in owners]


def _one(
    taste: TasteModels,
    *,
    reader: ShardReader,
    position: int,
    path: Path,
    user_id: str | None,
    words: bool,
    seed: int,
) -> tuple[BatchEntry, str | None]:
    """What became of a user, and whether the file was built or kept."""
    size: dict[str, Any] = {"liked": 0, "disliked": 0}
    try:
        sample = reader.read(position)
        size = {"liked": len(sample.liked), "disliked": len(sample.disliked)}
        done = "kept"
        if not _is_whole(path, taste=taste, size=size, user_id=user_id, words=words):
            profile = taste.build_profile(
                _pictures(sample, side="liked"),
                disliked=_pictures(sample, side="disliked"),
                user_id=user_id,
                words=words,
                seed=seed,
            )
            profile.save(path)
            done = "built"
        return BatchEntry(key=sample.key, file=path.name, user_id=user_id, **size), done
    except DataError as error:
        entry = BatchEntry(key=reader.key(position), file=None, user_id=user_id, **size)
        return replace(entry, reason=str(error)), None


def _is_whole(
    path: Path, *, taste: TasteModels, size: dict[str, int], user_id: str | None, words: bool
) -> bool:
    """Whether a file is what would be built again; a torn one, or one of other models, is not."""
    if not path.is_file():
        return False
    try:
        found = UserProfile.load(path)
    except CheckpointError:
        return False
    counts = {"liked": found.counts.liked, "disliked": found.counts.disliked}
    return (
        counts == size
        and found.counts.updates == found.counts.combined == 0
        and dict(found.lineage) == taste.lineage
        and found.user_id == user_id
        and (found.likes is not None) == words
    )


def _pictures(sample: UserSample, *, side: Side) -> list[Image.Image]:
    return [
        decode_image(data, where=sample.image_where(side, position=position))
        for position, data in enumerate(sample.side(side))
    ]


def _write_index(path: Path, *, entries: list[BatchEntry], made_from: dict[str, Any]) -> None:
    rows = [{name: value for name, value in asdict(entry).items() if value is not None} for entry in entries]
    record = {"version": _INDEX_VERSION, **made_from, "profiles": rows}
    try:
        write_json(path, content=record, shared=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
