"""Encoded shards: what a pipeline's frozen encoders make of every liked image and its prompt, computed once.

A user's samples lie side by side, one per liked image, so that a training step reads one image and no
more. Each shard stands for one shard of histories and is written whole or not at all: an interrupted encoding
goes on at the first shard that is missing, and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prefgen.data.embeddings import MAX_ARRAY_BYTES, from_npy, to_npy
from prefgen.data.index import (
    ALL_SPLITS,
    INDEX_NAME,
    SHARD_NAME,
    ShardEntry,
    ShardIndex,
    group_users,
    local_path,
    parse_json,
    parse_shard,
    read_index,
    shard_record,
    write_index,
)
from prefgen.data.reader import MAX_JSON_BYTES
from prefgen.data.tarstore import OpenShard, ShardFiles, sample_key, split_members
from prefgen.errors import DataError
from prefgen.schema import Split
from prefgen.whole_file import write_text

StoredAs = Literal["float16", "float32"]
ARRAYS = ("moments", "hidden", "pooled")
JSON_MEMBER = "image.json"
BUCKETS_NAME = "buckets.json"

_WORK = ".encode"
_DTYPES: dict[StoredAs, type[np.floating[Any]]] = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """One liked image and its prompt.

    Attributes:
        key: image key.
        prompt: the text that was encoded.
        bucket: place among the sizes in the set's header.
        moments: (2,C,h,w) mean and standard deviation of the VAE's posterior, unscaled.
        hidden: (T,Dcross) what the text cross-attention reads.
        pooled: (Dtext,) one vector of the text.
    """

    key: str
    prompt: str
    bucket: int
    moments: NDArray[Any]
    hidden: NDArray[Any]
    pooled: NDArray[Any]


class EncodedFolder:
    """Writes a set, shard by shard, from wherever an earlier attempt stopped.

    Attributes:
        finished: whether the set was complete when it was opened.
    """

    def __init__(
        self, out: Path | str, *, header: Mapping[str, Any], source: ShardIndex, stored_as: StoredAs
    ) -> None:
        """Open or begin.

        Args:
            out: folder of the set.
            header: plain json: which encoders, which sizes, which histories.
            source: index of the histories.
            stored_as: number format of the arrays.

        Raises:
            DataError: the folder holds something else, or a set of other encoders or histories.
        """
        self.out = local_path(out)
        self._source = source
        self._dtype = _DTYPES[stored_as]
        self._header = json.loads(json.dumps({**header, "stored_as": stored_as}, allow_nan=False))
        self.finished = (self.out / INDEX_NAME).is_file()
        self._work = self.out / _WORK
        request = self._work / "request.json"
        if self.finished:
            self._check(dict(read_index(self.out, kind="encoded").header))
        elif request.is_file():
            self._check(parse_json(request.read_bytes(), where=str(request), max_bytes=MAX_JSON_BYTES))
        else:
            if self.out.is_dir() and any(SHARD_NAME.fullmatch(path.name) for path in self.out.glob("*.tar")):
                raise DataError(f"{self.out} holds other shards; pass another folder")
            _make(self._work)
            write_text(request, text=json.dumps(self._header, sort_keys=True))

    def _check(self, found: object) -> None:
        if found != self._header:
            theirs = found if isinstance(found, dict) else {}
            odd = sorted(n for n in {*theirs, *self._header} if theirs.get(n) != self._header.get(n))
            raise DataError(
                f"{self.out} was encoded with another {', '.join(odd)}; pass another folder, or delete it"
            )

    def missing(self) -> list[tuple[Split, int]]:
        """Shards still to be written: split and number of the shard of histories."""
        if self.finished:
            return []
        return [
            (split, number)
            for split in ALL_SPLITS
            for number, shard in enumerate(self._source.splits.get(split, ()))
            if not (self._note(shard.name).is_file() and (self.out / shard.name).is_file())
        ]

    def write(
        self, split: Split, *, number: int, users: Iterable[tuple[str, tuple[EncodedImage, ...]]]
    ) -> None:
        """Write one shard.

        Args:
            split: of the users.
            number: of the shard of histories.
            users: user id and liked images in the order of the history, users in the order of the shard.

        Raises:
            DataError: a number does not fit the format it is stored in.
        """
        name = self._source.splits[split][number].name
        shard = OpenShard(self.out / name)
        buckets: dict[str, list[int]] = {}
        try:
            for user_id, images in users:
                for part, image in enumerate(images):
                    shard.write(
                        sample_key(user_id, part=part),
                        user_id=user_id,
                        members=self._members(image),
                        liked=1,
                        disliked=0,
                    )
                buckets[user_id] = [image.bucket for image in images]
            done = shard.close()
        except BaseException:
            shard.discard()
            raise
        note = {"shard": shard_record(done), "buckets": buckets}
        write_text(self._note(name), text=json.dumps(note, ensure_ascii=False))

    def _members(self, image: EncodedImage) -> dict[str, bytes]:
        record = {"key": image.key, "prompt": image.prompt, "bucket": image.bucket}
        text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        members = {JSON_MEMBER: text.encode("utf-8")}
        for name in ARRAYS:
            with np.errstate(over="ignore"):
                stored = np.asarray(getattr(image, name)).astype(self._dtype)
            if not np.isfinite(stored).all():
                raise DataError(
                    f"{image.key}: {name} does not fit {np.dtype(self._dtype).name}; encode with float32"
                )
            members[f"{name}.npy"] = to_npy(stored, dtype=self._dtype)
        return members

    def close(self) -> ShardIndex:
        """Write the index, last, when no shard is missing; a finished set stays as it is."""
        if self.finished:
            return read_index(self.out, kind="encoded")
        splits: dict[Split, tuple[ShardEntry, ...]] = {}
        buckets: dict[str, list[int]] = {}
        for split in ALL_SPLITS:
            notes = [self._read_note(shard.name) for shard in self._source.splits.get(split, ())]
            shards = tuple(parse_shard(note["shard"], split=split) for note in notes)
            if shards:
                splits[split] = shards
            for note in notes:
                buckets |= note["buckets"]
        write_text(self.out / BUCKETS_NAME, text=json.dumps(buckets, ensure_ascii=False))
        index = ShardIndex(kind="encoded", splits=splits, header=self._header)
        write_index(index, out=self.out)
        shutil.rmtree(self._work, ignore_errors=True)
        self.finished = True
        return index

    def _note(self, shard: str) -> Path:
        return self._work / f"{shard}.json"

    def _read_note(self, shard: str) -> dict[str, Any]:
        note = self._note(shard)
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        return found


class EncodedReader:
    """The encoded images of one split. Safe to fork and to pickle.

    Attributes:
        header: which encoders made the set, at which sizes.
    """

    def __init__(self, root: Path | str, *, split: Split) -> None:
        """Open.

        Raises:
            DataError: no such set or split, or a damaged one.
        """
        self.root = local_path(root)
        index = read_index(self.root, kind="encoded")
        self.header: Mapping[str, Any] = index.header
        shards = index.shards(split, where=self.root)
        self._entries = {group[0].user_id: (shard, group) for shard in shards for group in group_users(shard)}
        self._files = ShardFiles(self.root)

    def num_images(self, user_id: str) -> int:
        """Liked images of a user; 0 for one that is not in the set."""
        return len(self._entries[user_id][1]) if user_id in self._entries else 0

    def buckets(self) -> dict[str, list[int]]:
        """Bucket of each liked image, by user: of all splits."""
        path = self.root / BUCKETS_NAME
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); encode again") from None
        found: dict[str, list[int]] = parse_json(data, where=str(path), max_bytes=1 << 32)
        return found

    def users(self) -> Iterator[str]:
        """User ids in the order of the shards."""
        return iter(self._entries)

    def image(self, user_id: str, *, position: int) -> EncodedImage:
        """One liked image of a user, by its place in the history.

        Raises:
            DataError: it is not in the set, or damaged.
        """
        if not 0 <= position < self.num_images(user_id):
            raise DataError(
                f"{self.root} has no liked image {position} of user {user_id}: it was encoded from other "
                "histories; run 'prefgen data encode' again"
            )
        shard, group = self._entries[user_id]
        entry = group[position]
        where = f"{self.root / shard.name}: sample {entry.key}"
        data = self._files.read(shard, sample=entry)
        members = split_members(data, key=entry.key, where=where, max_member_bytes=MAX_ARRAY_BYTES)
        if members.keys() != {JSON_MEMBER, *(f"{name}.npy" for name in ARRAYS)}:
            raise DataError(f"{where}: holds {', '.join(sorted(members))}; encode again")
        record = parse_json(members[JSON_MEMBER], where=where, max_bytes=MAX_JSON_BYTES)
        arrays = {
            name: from_npy(members[f"{name}.npy"], where=f"{where}: {name}", dtypes=tuple(_DTYPES.values()))
            for name in ARRAYS
        }
        try:
            return EncodedImage(
                key=str(record["key"]), prompt=str(record["prompt"]), bucket=int(record["bucket"]), **arrays
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}: {JSON_MEMBER} lacks or misuses {error}") from None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {folder.parent} ({error.strerror}); pass another folder") from None
