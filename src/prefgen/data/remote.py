"""Shards in an object store, read through fsspec by way of a local cache that stays below a size.

A whole tar file is fetched when its first sample is asked for, checked against the index's checksum while it
comes, and kept under that checksum: a changed set never meets old files. The one used longest ago goes first.
Credentials and endpoints are fsspec's own affair (its environment variables and configuration files).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefgen.errors import DataError
from prefgen.whole_file import whole_file

PROTOCOLS = ("s3", "gs", "gcs", "az", "abfs", "http", "https", "memory")
"""What is accepted; fsspec knows more, some of which run programs or read any file."""

_ADDRESS = re.compile(r"([a-z0-9]+)://[^\x00]+")
_CHUNK = 4 << 20
_MAX_INDEX_BYTES = 4 << 30
_LOCKS = 64


def is_remote(address: str) -> bool:
    """Whether text is an address rather than a path."""
    return "://" in address


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of shards in an object store. Safe to fork and to pickle; processes share the cache.

    Attributes:
        address: such as ``s3://bucket/shards``.
        cache: local folder; made when missing.
        max_bytes: most that the tar files in ``cache`` take together, of all folders read through it. A file
            larger than that is refused.
    """

    address: str
    cache: Path
    max_bytes: int

    def __post_init__(self) -> None:
        """Refuse what fsspec would take and prefgen does not."""
        match = _ADDRESS.fullmatch(self.address)
        if match is None or match[1] not in PROTOCOLS or "::" in self.address:
            raise DataError(
                f"{self.address!r} is no folder prefgen reads: pass a local folder or an address that begins "
                f"with one of {', '.join(f'{name}://' for name in PROTOCOLS)}"
            )

    def __truediv__(self, name: str) -> str:
        """Address of a file in the folder, as messages name it."""
        return f"{self.address.rstrip('/')}/{name}"

    def __str__(self) -> str:
        return self.address

    def index_path(self, name: str) -> Path:
        """A local copy of the index, fetched anew each time.

        Raises:
            DataError: it is not there, or the store cannot be reached.
        """
        folder = self.cache / "indexes"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{hashlib.sha256(self.address.encode()).hexdigest()[:32]}.json"
        self._fetch(name, path=path, limit=_MAX_INDEX_BYTES)
        return path

    def shard_path(self, name: str, *, sha256: str, size: int) -> Path:
        """A tar file in the cache, fetched if it is not there.

        Raises:
            DataError: it is not there or not what the index says, the store cannot be reached, or it alone is
                larger than the cache may be.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise DataError(
                f"{self / name}: the index gives no checksum to keep it under; build the shards again"
            )
        if size > self.max_bytes:
            raise DataError(
                f"{self / name} has {size:,} bytes, more than the whole cache may hold "
                f"({self.max_bytes:,}); raise loader.cache_gb"
            )
        folder = self.cache / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{sha256}.tar"
        with self._lock(sha256):
            if path.is_file():
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
                    return path
            self._make_room(size, folder=folder)
            self._fetch(name, path=path, limit=size, sha256=sha256)
        return path

    def _make_room(self, size: int, *, folder: Path) -> None:
        """Delete the files used longest ago. Readers that have one open keep it until they close it."""
        kept = []
        for path in folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                kept.append((found.st_mtime, found.st_size, path))
        total = sum(length for _, length, _ in kept)
        for _, length, path in sorted(kept):
            if total + size <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= length

    def _fetch(self, name: str, *, path: Path, limit: int, sha256: str = "") -> None:
        digest, size = hashlib.sha256(), 0
        with whole_file(path, shared=True) as part:
            with self._open(name) as source, part.open("wb") as target:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    if size > limit:
                        raise DataError(f"{self / name}: more than the {limit:,} bytes that are expected")
                    target.write(chunk)
            if sha256 and (size != limit or digest.hexdigest() != sha256):
                raise DataError(
                    f"{self / name}: {size:,} bytes with another checksum than the index says; "
                    "upload the shards and their index again"
                )

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        import fsspec  # takes a moment that readers of local folders need not wait

        try:
            with fsspec.open(self / name, "rb").open() as file:
                yield file
        except FileNotFoundError:
            raise DataError(f"no {self / name}; make it with 'prefgen data build' and upload it") from None
        except ImportError as error:
            raise DataError(f"{self / name}: {' '.join(str(error).split())[:160]}") from None
        except DataError:
            raise
        except Exception as error:  # every store has its own errors
            if isinstance(error, OSError) and error.filename is not None:
                raise  # of the local cache: a full disk, say
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise DataError(f"{self / name}: cannot be read ({reason})") from None

    @contextlib.contextmanager
    def _lock(self, sha256: str) -> Iterator[None]:
        """One process at a time fetches a file; others of this machine wait for it instead."""
        folder = self.cache / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{int(sha256[:8], 16) % _LOCKS:02d}").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
