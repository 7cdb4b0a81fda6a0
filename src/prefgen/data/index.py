"""``index.json``: what a folder of shards holds, where each sample starts, and how to know it is unharmed.

The index is written last and renamed into place, so a folder has a whole index and whole shards, or no index.
Random access by byte offset is what lets a resumed run seek instead of replaying.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from prefgen.data.remote import RemoteFolder
from prefgen.errors import DataError
from prefgen.lineage import hash_file
from prefgen.schema import SCHEMA_VERSION, SPLITS, Split
from prefgen.whole_file import whole_file

INDEX_NAME = "index.json"
MAX_INDEX_BYTES = 4 << 30
SHARD_NAME = re.compile(r"(train|validation|test)-\d{6,}\.tar")
SAMPLE_KEY = re.compile(r"[A-Za-z0-9_~-]{1,80}")

Kind = Literal["histories", "embeddings", "encoded"]
KINDS = ("histories", "embeddings", "encoded")
ALL_SPLITS = cast("tuple[Split, ...]", SPLITS)


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """One sample of a shard. A user with very many images owns several neighbouring samples.

    Attributes:
        key: tar member prefix.
        user_id: whose sample it is.
        offset: first byte of its first tar header.
        size: bytes up to the next sample's first header.
        liked: number of liked images in this sample (0 in embedding shards).
        disliked: number of disliked images in this sample.
    """

    key: str
    user_id: str
    offset: int
    size: int
    liked: int
    disliked: int


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One tar file: its name inside the folder, checksum, size in bytes and samples in file order."""

    name: str
    sha256: str
    size: int
    samples: tuple[SampleEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Totals of a split: logical users (not samples), images of either side, bytes of its shards."""

    users: int = 0
    liked: int = 0
    disliked: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """A parsed ``index.json``.

    Attributes:
        kind: user histories with images, user embeddings, or images and prompts as a pipeline encodes them.
        splits: shards of each split; an absent split holds nothing.
        header: which models made an embedding set (plain json); empty for histories.
        dropped: what building left out, by reason, with how often.
        schema_version: version of shards and of this file.
    """

    kind: Kind
    splits: Mapping[Split, tuple[ShardEntry, ...]]
    header: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def counts(self, split: Split) -> Counts:
        """Totals of one split; zeros when it is absent."""
        shards = self.splits.get(split, ())
        samples = [sample for shard in shards for sample in shard.samples]
        return Counts(
            users=len({sample.user_id for sample in samples}),
            liked=sum(sample.liked for sample in samples),
            disliked=sum(sample.disliked for sample in samples),
            bytes=sum(shard.size for shard in shards),
        )

    def shards(self, split: Split, *, where: object) -> tuple[ShardEntry, ...]:
        """Shards of a split.

        Raises:
            DataError: the split is unknown or holds no users; the message lists those that do.
        """
        found = self.splits.get(split, ())
        if not found:
            have = ", ".join(name for name in ALL_SPLITS if self.splits.get(name)) or "none"
            raise DataError(f"no split {split!r} in {where}; it holds: {have}")
        return found


def group_users(shard: ShardEntry) -> Iterator[tuple[SampleEntry, ...]]:
    """Neighbouring samples of one user, as one tuple per logical user, in file order."""
    group: list[SampleEntry] = []
    for sample in shard.samples:
        if group and group[-1].user_id != sample.user_id:
            yield tuple(group)
            group = []
        group.append(sample)
    if group:
        yield tuple(group)


def write_index(index: ShardIndex, *, out: Path, name: str = INDEX_NAME) -> Path:
    """Write ``index.json`` into ``out``, whole and on the disk or not at all, and return its path."""
    record = {
        "schema_version": index.schema_version,
        "kind": index.kind,
        "header": dict(index.header),
        "dropped": dict(sorted(index.dropped.items())),
        "splits": {
            split: {
                "counts": _counts_record(index.counts(split)),
                "shards": [shard_record(shard) for shard in index.splits[split]],
            }
            for split in ALL_SPLITS
            if index.splits.get(split)
        },
    }
    path = out / name
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        json.dump(record, file, ensure_ascii=False, separators=(",", ":"))
        file.flush()
        os.fsync(file.fileno())
    return path


def read_index(path: Path | str | RemoteFolder, *, kind: Kind | None = None) -> ShardIndex:
    """Read and check an index.

    Args:
        path: the shard folder, or its ``index.json``. An address must come as a :class:`RemoteFolder`; text
            that looks like one is refused.
        kind: what it must hold; ``None`` accepts either.

    Raises:
        DataError: missing, a URL or pipe, no json, another schema version, another kind, or inconsistent.
    """
    if isinstance(path, RemoteFolder):
        file = path.index_path(INDEX_NAME)
    else:
        file = local_path(path)
        file = file / INDEX_NAME if file.is_dir() else file
    if not file.is_file():
        raise DataError(
            f"no shard index at {file}; make one with 'prefgen data build' or pass another folder"
        )
    where = path / INDEX_NAME if isinstance(path, RemoteFolder) else str(file)
    record = parse_json(file.read_bytes(), where=where, max_bytes=MAX_INDEX_BYTES)
    try:
        return _parse_index(record, where=where, kind=kind)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where}: damaged index ({type(error).__name__}: {error}); build the shards again"
        ) from None


def local_path(address: Path | str) -> Path:
    """A local path, refusing what webdataset would hand to a shell or a downloader.

    Raises:
        DataError: the address is a ``pipe:`` command or a URL, or holds a NUL byte.
    """
    text = str(address)
    if text.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text) or "\x00" in text:
        raise DataError(f"{text!r} is not a local path; pipes and URLs are refused: pass a folder of shards")
    return Path(address)


def open_root(root: Path | str | RemoteFolder) -> Path | RemoteFolder:
    """A folder that a reader is given: remote ones as they are, others through :func:`local_path`."""
    return root if isinstance(root, RemoteFolder) else local_path(root)


def index_hash(root: Path | RemoteFolder) -> str:
    """SHA-256 of a set's ``index.json``, which stands for all of its shards, as hex.

    Raises:
        DataError: it cannot be read.
    """
    return hash_file(root.index_path(INDEX_NAME) if isinstance(root, RemoteFolder) else root / INDEX_NAME)


def parse_json(data: bytes, *, where: str, max_bytes: int) -> Any:
    """``json.loads`` with a size limit and every failure as :class:`DataError`."""
    if len(data) > max_bytes:
        raise DataError(f"{where}: json of {len(data):,} bytes; at most {max_bytes:,} are accepted")
    try:
        return json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{where}: not valid json ({error})") from None
    except RecursionError:
        raise DataError(f"{where}: json is nested too deeply") from None


def _counts_record(counts: Counts) -> dict[str, int]:
    return {
        "users": counts.users,
        "liked": counts.liked,
        "disliked": counts.disliked,
        "bytes": counts.bytes,
    }


def shard_record(shard: ShardEntry) -> dict[str, Any]:
    """A shard as json; :func:`parse_shard` reads it."""
    rows = [[s.key, s.user_id, s.offset, s.size, s.liked, s.disliked] for s in shard.samples]
    return {"name": shard.name, "sha256": shard.sha256, "size": shard.size, "samples": rows}


def _parse_index(record: Any, *, where: str, kind: Kind | None) -> ShardIndex:
    version = record["schema_version"]
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{where}: schema version {version!r}, but this prefgen reads {SCHEMA_VERSION}; "
            "build the shards again with this version"
        )
    found = record["kind"]
    if found not in KINDS:
        raise ValueError(f"kind {found!r} is not one of {', '.join(KINDS)}")
    if kind is not None and found != kind:
        raise DataError(f"{where}: holds {found}, but {kind} are needed here; pass the other folder")
    splits: dict[Split, tuple[ShardEntry, ...]] = {}
    owner: dict[str, str] = {}
    for split, content in record["splits"].items():
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        shards = tuple(parse_shard(shard, split=split) for shard in content["shards"])
        for shard in shards:
            _check_owners(shard, owner=owner, where=where)
        splits[cast(Split, split)] = shards
        index = ShardIndex(kind=found, splits={cast(Split, split): shards})
        if _counts_record(index.counts(cast(Split, split))) != content["counts"]:
            raise ValueError(f"counts of split {split!r} do not match its samples")
    return ShardIndex(
        kind=found, splits=splits, header=dict(record["header"]), dropped=dict(record["dropped"])
    )


def check_unique_users(index: ShardIndex, *, where: str) -> None:
    """Refuse an index in which a user lives in two places.

    Raises:
        DataError: naming the user and both places.
    """
    owner: dict[str, str] = {}
    for shards in index.splits.values():
        for shard in shards:
            _check_owners(shard, owner=owner, where=where)


def _check_owners(shard: ShardEntry, *, owner: dict[str, str], where: str) -> None:
    """A user lives in one place: two groups with one id would leak between splits or count twice."""
    for group in group_users(shard):
        user = group[0].user_id
        if user in owner:
            raise DataError(
                f"{where}: two users with the id {user!r} (in {owner[user]} and {shard.name}); "
                "ids must be unique over all splits"
            )
        owner[user] = shard.name


def parse_shard(record: Any, *, split: str) -> ShardEntry:
    """A shard of an index, checked.

    Raises:
        DataError: it names a file elsewhere.
        ValueError, KeyError, TypeError: it is damaged.
    """
    name = record["name"]
    if not SHARD_NAME.fullmatch(name) or not name.startswith(f"{split}-"):
        raise DataError(
            f"index names the shard {name!r}; expected a plain file name like '{split}-000000.tar'"
        )
    samples = tuple(_parse_sample(row, size=record["size"]) for row in record["samples"])
    for before, after in zip(samples, samples[1:], strict=False):
        if after.offset < before.offset + before.size:
            raise ValueError(f"samples {before.key} and {after.key} of {name} overlap")
    return ShardEntry(name=name, sha256=str(record["sha256"]), size=int(record["size"]), samples=samples)


def _parse_sample(row: Any, *, size: int) -> SampleEntry:
    key, user_id, *numbers = row
    if not isinstance(key, str) or not isinstance(user_id, str) or not SAMPLE_KEY.fullmatch(key):
        raise ValueError(f"sample {key!r} is not a plain key")
    if len(numbers) != 4 or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"sample {key} needs four non-negative numbers, got {numbers}")
    offset, length, liked, disliked = numbers
    if offset % 512 or length % 512 or length == 0 or offset + length > size:
        raise ValueError(f"sample {key} lies at {offset}+{length}, outside its shard of {size} bytes")
    return SampleEntry(key, user_id, offset, length, liked, disliked)
