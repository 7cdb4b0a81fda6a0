"""Tar files as the shards use them: written whole or not at all, read one sample at a time by byte offset."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from prefgen.data.index import (
    INDEX_NAME,
    SAMPLE_KEY,
    SHARD_NAME,
    Kind,
    SampleEntry,
    ShardEntry,
    ShardIndex,
    write_index,
)
from prefgen.data.parts import PARTS_FOLDER, Part, write_part_index
from prefgen.data.remote import RemoteFolder
from prefgen.errors import DataError
from prefgen.schema import Split

BLOCK = 512
EXECUTABLE_MEMBERS = (".pyd", ".pickle", ".pkl", ".pth", ".pt")
"""Member endings that webdataset's default decoders, or torch.load, would unpickle: code in the data."""


class ShardFolder:
    """Writes the shards of all splits, then the index. Use as a context manager.

    Leaving it on an error removes what is open.
    Bytes are a pure function of the samples: time stamps and owners are fixed, so equal input gives equal
    checksums on every machine.
    """

    def __init__(
        self,
        out: Path | str,
        *,
        kind: Kind,
        samples_per_shard: int,
        overwrite: bool = False,
        part: Part | None = None,
        first_shards: Mapping[Split, int] | None = None,
        plan: str = "",
    ) -> None:
        """Prepare the folder.

        Args:
            out: created when missing.
            kind: recorded in the index.
            samples_per_shard: users per tar file, at least 1.
            overwrite: remove an earlier set first; without it an occupied folder is refused.
            part: write a part of the set, for :func:`prefgen.data.parts.merge_parts`; ``overwrite`` is then
                the merge's affair.
            first_shards: number of the first tar file of each split, where a part begins in the middle.
            plan: see :func:`prefgen.data.parts.write_part_index`.

        Raises:
            DataError: the folder already holds shards, or ``samples_per_shard`` is below 1.
        """
        if samples_per_shard < 1:
            raise DataError(f"users per shard: expected at least 1, got {samples_per_shard}")
        self.out = Path(out)
        self._part, self._plan, self._first = part, plan, dict(first_shards or {})
        self._folder = self.out if part is None else self.out / PARTS_FOLDER
        self._kind: Kind = kind
        self._limit = samples_per_shard
        self._open: dict[Split, OpenShard] = {}
        self._done: dict[Split, list[ShardEntry]] = {}
        self._keys: set[str] = set()
        if part is None:
            prepare_folder(self.out, overwrite=overwrite)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / part.index_name).unlink(missing_ok=True)

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        for shard in self._open.values():
            shard.discard()
        self._open.clear()

    def add_user(self, user_id: str, *, split: Split, parts: list[tuple[dict[str, bytes], int, int]]) -> None:
        """Append the samples of one user: (members by suffix, liked count, disliked count) each.

        All parts go into the same shard, side by side, so that a reader merges them with neighbouring reads.
        """
        shard = self._open.get(split)
        if shard is None:
            number = self._first.get(split, 0) + len(self._done.setdefault(split, []))
            shard = self._open[split] = OpenShard(self._folder / f"{split}-{number:06d}.tar")
        for part, (members, liked, disliked) in enumerate(parts):
            key = self._new_key(user_id, part=part)
            shard.write(key, user_id=user_id, members=members, liked=liked, disliked=disliked)
        shard.users += 1
        if shard.users >= self._limit:
            self._done[split].append(self._open.pop(split).close())

    def close(
        self, *, header: Mapping[str, Any] | None = None, dropped: Mapping[str, int] | None = None
    ) -> ShardIndex:
        """Finish the open shards and write the index last."""
        for split in list(self._open):
            self._done[split].append(self._open.pop(split).close())
        splits = {split: tuple(shards) for split, shards in self._done.items() if shards}
        index = ShardIndex(kind=self._kind, splits=splits, header=header or {}, dropped=dropped or {})
        if self._part is None:
            write_index(index, out=self.out)
        else:
            write_part_index(index, out=self.out, part=self._part, plan=self._plan)
        return index

    def _new_key(self, user_id: str, *, part: int) -> str:
        key = sample_key(user_id, part=part)
        if key in self._keys:
            raise DataError(f"two users with the id {user_id!r}; ids must be unique over all splits")
        self._keys.add(key)
        return key


def sample_key(user_id: str, *, part: int) -> str:
    """Key of a user's sample number ``part``: the id itself where tar and webdataset can bear it."""
    plain = SAMPLE_KEY.fullmatch(user_id) and len(user_id) <= 64 and "~" not in user_id
    # webdataset ends a key at the first dot, and tar names hold 100 bytes: other ids are hashed.
    key = user_id if plain else "~" + hashlib.sha256(user_id.encode("utf-8")).hexdigest()[:32]
    return f"{key}~{part:03d}" if part else key


class _HashingFile:
    """A file that hashes what passes, so that the checksum needs no second reading."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)


class OpenShard:
    """One tar file being written under a temporary name: ``write``, then ``close`` or ``discard``."""

    def __init__(self, path: Path) -> None:
        import webdataset  # here because importing it costs half a second that readers need not pay

        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")
        self.users = 0
        self._file = self.temporary.open("wb")
        self._hashed = _HashingFile(self._file)
        self._tar = webdataset.TarWriter(
            self._hashed, encoder=False, mtime=0, user="prefgen", group="prefgen"
        )
        self._samples: list[SampleEntry] = []

    def write(self, key: str, *, user_id: str, members: dict[str, bytes], liked: int, disliked: int) -> None:
        """Append one sample."""
        start = self._tar.tarstream.offset
        self._tar.write({"__key__": key, **members})
        size = self._tar.tarstream.offset - start
        self._samples.append(SampleEntry(key, user_id, start, size, liked, disliked))

    def close(self) -> ShardEntry:
        """Finish, give the file its name, and say what it holds."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.temporary.replace(self.path)
        digest = self._hashed.hash.hexdigest()
        return ShardEntry(self.path.name, digest, self._hashed.size, tuple(self._samples))

    def discard(self) -> None:
        """Leave nothing of it."""
        # The tar first: it would write its end into a closed file when collected. A full disk must not hide
        # the error that brought us here.
        with contextlib.suppress(OSError):
            self._tar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self.temporary.unlink(missing_ok=True)


class ShardFiles:
    """Open shard files of one process. ``pread`` moves no shared position, so forks may use it at once."""

    def __init__(self, root: Path | RemoteFolder, *, max_open: int = 64) -> None:
        self._root = root
        # An open file that the cache has dropped still takes its place on the disk.
        self._max_open = min(max_open, 8) if isinstance(root, RemoteFolder) else max_open
        self._handles: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_root": self._root, "_max_open": self._max_open, "_handles": {}}

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)

    def read(self, shard: ShardEntry, *, sample: SampleEntry) -> bytes:
        """Bytes of one sample.

        Raises:
            DataError: the shard is missing, no regular file, or shorter or longer than the index says.
        """
        handle = self._handles.get(shard.name)
        if handle is None:
            handle = self._open(shard)
        try:
            data = os.pread(handle, sample.size, sample.offset)
        except OSError as error:
            raise DataError(f"{self._root / shard.name}: cannot be read ({error.strerror})") from None
        if len(data) != sample.size:
            raise DataError(f"{self._root / shard.name}: truncated inside sample {sample.key}")
        return data

    def _open(self, shard: ShardEntry) -> int:
        if isinstance(self._root, RemoteFolder):
            return self._keep(shard, handle=self._open_remote(shard, root=self._root))
        path = self._root / shard.name
        if not path.is_file():
            raise DataError(f"{path}: shard named by {INDEX_NAME} is missing; build or copy the shards again")
        found = path.stat().st_size
        if found != shard.size:
            word = "truncated" if found < shard.size else "altered"
            raise DataError(
                f"{path}: {word}: {found:,} bytes, but {INDEX_NAME} says {shard.size:,}; "
                "copy or build it again"
            )
        return self._keep(shard, handle=os.open(path, os.O_RDONLY))

    def _open_remote(self, shard: ShardEntry, *, root: RemoteFolder) -> int:
        for _ in range(8):
            path = root.shard_path(shard.name, sha256=shard.sha256, size=shard.size)
            with contextlib.suppress(FileNotFoundError):  # another process made room in this very moment
                return os.open(path, os.O_RDONLY)
        raise DataError(
            f"{root / shard.name}: dropped from the cache again and again before it could be read; raise "
            "loader.cache_gb, or use fewer loader.num_workers"
        )

    def _keep(self, shard: ShardEntry, *, handle: int) -> int:
        if len(self._handles) >= self._max_open:
            oldest = next(iter(self._handles))
            os.close(self._handles.pop(oldest))
        self._handles[shard.name] = handle
        return handle


def split_members(data: bytes, *, key: str, where: str, max_member_bytes: int) -> dict[str, bytes]:
    """Members of one sample by suffix (the name behind ``KEY.``).

    Raises:
        DataError: a damaged header, a link or device, a foreign or double name, a member that could
            execute code, or one over ``max_member_bytes``.
    """
    members: dict[str, bytes] = {}
    position = 0
    while position < len(data):
        try:
            info = tarfile.TarInfo.frombuf(data[position : position + BLOCK], "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise DataError(
                f"{where}: damaged tar header at byte {position} of the sample ({error})"
            ) from None
        here = f"{where}: member {info.name[:120]!r}"
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise DataError(f"{here} is not a regular file; links, folders and devices are refused")
        prefix, _, suffix = info.name.partition(".")
        if prefix != key or not suffix or suffix in members:
            raise DataError(f"{here} does not belong here; expected each member of {key!r} once")
        if info.name.lower().endswith(EXECUTABLE_MEMBERS):
            raise DataError(f"{here} could execute code when decoded; pickled members are refused")
        if info.size > max_member_bytes:
            raise DataError(f"{here} has {info.size:,} bytes; at most {max_member_bytes:,} are accepted")
        start = position + BLOCK
        if info.size < 0 or start + info.size > len(data):
            raise DataError(f"{here} runs past the end of its sample")
        members[suffix] = data[start : start + info.size]
        position = start + -(-info.size // BLOCK) * BLOCK
    return members


def prepare_folder(out: Path, *, overwrite: bool) -> None:
    """Make a folder ready for a new set of shards.

    Raises:
        DataError: it cannot be made, or it holds shards and ``overwrite`` is false.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write shards to {out} ({error.strerror}); pass another folder") from None
    occupied = (out / INDEX_NAME).exists() or any(
        SHARD_NAME.fullmatch(path.name) for path in out.glob("*.tar")
    )
    if occupied and not overwrite:
        raise DataError(f"{out} already holds shards; pass another folder, or --overwrite to replace them")
    remove_shards(out)


def remove_shards(out: Path) -> None:
    """Delete a set of shards, whole or not."""
    # The index goes first: a writer killed after this leaves no index, and no reader accepts that.
    (out / INDEX_NAME).unlink(missing_ok=True)
    earlier = [path for path in out.glob("*.tar") if SHARD_NAME.fullmatch(path.name)]
    for path in [*earlier, *out.glob(".*.tmp"), *out.glob("*.json.part")]:
        path.unlink()
