"""Broken and malicious histories, images, indexes and shards."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from prefgen.testing.data import make_shards, write_raw
from prefgen.testing.hostile_case import EVIL, MARK, Hostile


def data_inputs() -> Iterator[Hostile]:
    """All of them."""
    yield from _histories()
    yield from _image_paths()
    yield from _images()
    yield from _indexes()
    yield from _tars()


# history.jsonl


def _build(folder: Path, lines: bytes) -> list[str]:
    write_raw(folder / "raw", num_users=1, num_liked=2, num_disliked=1)
    path = folder / "raw" / "history.jsonl"
    path.write_bytes(lines)
    return ["data", "build", "--history", str(path), "--out", str(folder / "out"), "--workers", "0"]


GOOD: dict[str, Any] = {"user_id": "u000000", "liked": [{"image": "images/u000000-liked-000.webp"}]}


def _histories() -> Iterator[Hostile]:
    texts: dict[str, bytes] = {
        "empty file": b"",
        "half a line": b'{"user_id": "u',
        "null": b"null",
        "a list": b"[]",
        "a number": b"3",
        "text": b'"x"',
        "100,000 brackets": b"[" * 100_000,
        "100,000 nested objects": b'{"liked":' * 100_000,
        "a number of 5,000 digits": b'{"user_id": ' + b"9" * 5000 + b"}",
        "not utf-8": b'{"user_id": "\xff\xfe"}',
        "utf-16": '{"user_id": "u"}'.encode("utf-16"),
        "NUL bytes": b"\x00" * 100,
        "a line of 17 MB": b'{"user_id": "' + b"x" * (17 << 20) + b'"}',
        "a pickle": EVIL,
        "a lone surrogate": b'{"user_id": "\\ud800", "liked": []}',
    }
    for name, text in texts.items():
        yield Hostile(kind="history.jsonl", name=name, make=partial(_build, lines=text))
    fields: dict[str, dict[str, Any]] = {
        "no user_id": {"user_id": None},
        "empty user_id": {"user_id": ""},
        "user_id with a slash": {"user_id": "../../x"},
        "user_id of 200 characters": {"user_id": "x" * 200},
        "user_id with a line break": {"user_id": "a\nb"},
        "user_id a list": {"user_id": ["x"]},
        "user_id true": {"user_id": True},
        "unknown source": {"source": "web"},
        "unknown split": {"split": "trian"},
        "split a list": {"split": ["train"]},
        "liked is text": {"liked": "images/a.webp"},
        "liked holds a number": {"liked": [3]},
        "image missing": {"liked": [{}]},
        "image a number": {"liked": [{"image": 3}]},
        "prompt a list": {"liked": [{"image": "a", "prompt": []}]},
        "attributes text": {"liked": [{"image": "a", "attributes": "red"}]},
        "attributes of numbers": {"liked_attributes": [1, 2]},
        "liked_attributes an object": {"liked_attributes": {"a": 1}},
        "unknown field": {"__class__": "os.system"},
        "no images at all": {"liked": [], "disliked": []},
    }
    for name, change in fields.items():
        line = json.dumps(GOOD | change).encode()
        yield Hostile(kind="history.jsonl", name=name, make=partial(_build, lines=line))
    twice = (json.dumps(GOOD) + "\n").encode() * 2
    yield Hostile(kind="history.jsonl", name="one user twice", make=partial(_build, lines=twice))


def _image_paths() -> Iterator[Hostile]:
    paths = {
        "a parent folder": "../../../etc/passwd",
        "a parent folder in the middle": "images/../../../etc/passwd",
        "an absolute path": "/etc/passwd",
        "a Windows path": "C:\\Windows\\win.ini",
        "backslashes": "..\\..\\x.png",
        "a pipe": f"pipe:touch {MARK}",
        "a web address": "http://127.0.0.1:9/x.png",
        "a file address": "file:///etc/passwd",
        "an object store": "s3://bucket/x.png",
        "a NUL byte": "images/a\x00.png",
        "a name of 5,000 characters": "x" * 5000,
        "nothing": "",
        "a folder": "images",
        "shell words": f"$(touch {MARK})",
        "no such file": "images/none.webp",
        "a link out": "link.webp",
        "a link to /dev/zero": "zero.webp",
        "a fifo": "fifo.webp",
        "a loop of links": "loop.webp",
    }

    def make(folder: Path, path: str) -> list[str]:
        words = _build(folder, json.dumps(GOOD | {"liked": [{"image": path}]}).encode())
        raw = folder / "raw"
        (raw / "link.webp").symlink_to("/etc/passwd")
        (raw / "zero.webp").symlink_to("/dev/zero")
        (raw / "loop.webp").symlink_to(raw / "loop.webp")
        os.mkfifo(raw / "fifo.webp")
        return words

    for name, path in paths.items():
        yield Hostile(kind="image path", name=name, make=partial(make, path=path))


def _png(width: int, height: int) -> bytes:
    """A png of a few bytes whose header promises any size."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def _images() -> Iterator[Hostile]:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "WEBP")
    webp = buffer.getvalue()
    contents = {
        "empty": b"",
        "text": b"no image",
        "a pickle": EVIL,
        "half a webp": webp[: len(webp) // 2],
        "a webp header alone": webp[:16],
        "a png of 60,000 x 60,000 pixels": _png(60_000, 60_000),
        "a png of 2 billion pixels wide": _png((1 << 31) - 1, 1),
        "a png of no size": _png(0, 0),
        "a jpeg header and noise": b"\xff\xd8\xff" + os.urandom(500),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch "
        + MARK.encode()
        + b") run\n",
        "svg with a script": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "a zip": b"PK\x03\x04" + b"\x00" * 100,
        "a fits file": b"SIMPLE  =                    T" + b" " * 3000,
        "html": b"<html><img src=x></html>",
    }
    for name, data in contents.items():

        def make(folder: Path, data: bytes = data) -> list[str]:
            words = _build(folder, json.dumps(GOOD).encode())
            (folder / "raw" / "images" / "u000000-liked-000.webp").write_bytes(data)
            return words

        yield Hostile(kind="image", name=name, make=make)


# index.json


def _indexes() -> Iterator[Hostile]:
    def shard(record: Any) -> Any:
        return record["splits"]["train"]["shards"][0]

    def row(record: Any, number: int = 0) -> Any:
        return shard(record)["samples"][number]

    edits: dict[str, Callable[[Any], object]] = {
        "another schema version": lambda r: r.update(schema_version=99),
        "schema version true": lambda r: r.update(schema_version=[1]),
        "no splits": lambda r: r.pop("splits"),
        "splits a list": lambda r: r.update(splits=[]),
        "unknown kind": lambda r: r.update(kind="pickles"),
        "unknown split": lambda r: r["splits"].update(trian=r["splits"]["train"]),
        "counts that lie": lambda r: r["splits"]["train"]["counts"].update(users=10**9),
        "a shard outside the folder": lambda r: shard(r).update(name="../../etc/passwd"),
        "an absolute shard": lambda r: shard(r).update(name="/etc/passwd"),
        "a pipe as shard": lambda r: shard(r).update(name=f"pipe:touch {MARK}"),
        "an address as shard": lambda r: shard(r).update(name="http://127.0.0.1:9/train-000000.tar"),
        "another split's shard": lambda r: shard(r).update(name="test-000000.tar"),
        "a shard that is not there": lambda r: shard(r).update(name="train-000777.tar"),
        "a size that lies": lambda r: shard(r).update(size=1 << 50),
        "a size of text": lambda r: shard(r).update(size="big"),
        "another checksum": lambda r: shard(r).update(sha256="0" * 64),
        "a negative offset": lambda r: row(r).__setitem__(2, -512),
        "an odd offset": lambda r: row(r).__setitem__(2, 100),
        "an offset of 2**62": lambda r: row(r).__setitem__(2, 1 << 62),
        "a length of 2**40": lambda r: row(r).__setitem__(3, 1 << 40),
        "a length of 0": lambda r: row(r).__setitem__(3, 0),
        "a fraction as offset": lambda r: row(r).__setitem__(2, 0.5),
        "true as offset": lambda r: row(r).__setitem__(2, True),
        "samples that overlap": lambda r: row(r, 1).__setitem__(2, 0),
        "a key that leads out": lambda r: row(r).__setitem__(0, "../x"),
        "a key of 10,000 letters": lambda r: row(r).__setitem__(0, "x" * 10_000),
        "one user twice": lambda r: row(r, 2).__setitem__(1, row(r)[1]),
        "too many numbers": lambda r: row(r).append(1),
        "too few numbers": lambda r: row(r).pop(),
        "an object as row": lambda r: shard(r)["samples"].__setitem__(0, {}),
    }
    for name, edit in edits.items():

        def make(folder: Path, edit: Callable[[Any], object] = edit) -> list[str]:
            shards = make_shards(folder, num_users=8, users_per_shard=8)
            record = json.loads((shards / "index.json").read_text())
            edit(record)
            (shards / "index.json").write_text(json.dumps(record))
            return ["data", "verify", str(shards), "--workers", "0"]

        yield Hostile(kind="index.json", name=name, make=make)
    for name, data in {
        "empty": b"",
        "half": b'{"schema_version": 1, "spl',
        "100,000 brackets": b"[" * 100_000,
        "a pickle": EVIL,
        "null": b"null",
    }.items():

        def make_whole(folder: Path, data: bytes = data) -> list[str]:
            shards = make_shards(folder, num_users=4)
            (shards / "index.json").write_bytes(data)
            return ["data", "inspect", str(shards)]

        yield Hostile(kind="index.json", name=name, make=make_whole)


# tar files


def _rewrite(shards: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], Any]) -> None:
    """Change the members of the first shard and fit the index to it, as a hostile writer would."""
    path = shards / "train-000000.tar"
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    change(members)
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            key = info.name.partition(".")[0]
            starts.setdefault(key, tar.offset)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            ends[key] = tar.offset
    record = json.loads((shards / "index.json").read_text())
    shard = record["splits"]["train"]["shards"][0]
    shard["size"] = path.stat().st_size
    record["splits"]["train"]["counts"]["bytes"] = shard["size"]
    for row in shard["samples"]:
        row[2], row[3] = starts[row[0]], ends[row[0]] - starts[row[0]]
    (shards / "index.json").write_text(json.dumps(record))


def _member(name: str, *, kind: bytes = tarfile.REGTYPE, target: str = "", data: bytes = b"x") -> Any:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    return info, data


def _place(members: list[tuple[tarfile.TarInfo, bytes]], suffix: str) -> int:
    """Of the first member of this kind: what comes first in a tar is for its writer to choose."""
    return next(i for i, (info, _) in enumerate(members) if info.name.endswith(f".{suffix}"))


def _replace(
    members: list[tuple[tarfile.TarInfo, bytes]], suffix: str, change: Callable[[bytes], bytes]
) -> None:
    place = _place(members, suffix)
    info, data = members[place]
    changed = change(data)
    if changed == data:
        raise AssertionError(f"{info.name} is what it was: the case would show nothing")
    members[place] = info, changed


def _tars() -> Iterator[Hostile]:
    added = {
        "a pickle": _member("u000000.x.pickle", data=EVIL),
        "a pyd": _member("u000000.x.pyd", data=EVIL),
        "a pth": _member("u000000.x.pth", data=EVIL),
        "a link out": _member("u000000.liked.900.webp", kind=tarfile.SYMTYPE, target="/etc/passwd"),
        "a hard link out": _member("u000000.liked.900.webp", kind=tarfile.LNKTYPE, target="../../x"),
        "a device": _member("u000000.liked.900.webp", kind=tarfile.CHRTYPE),
        "a fifo": _member("u000000.liked.900.webp", kind=tarfile.FIFOTYPE),
        "a folder": _member("u000000.d", kind=tarfile.DIRTYPE),
        "a path out": _member("u000000.../../x.webp"),
        "another user's member": _member("u000004.liked.000.webp"),
        "an image nobody names": _member("u000000.liked.900.webp"),
        "one member twice": _member("u000000.liked.000.webp"),
        "a script": _member("u000000.run.sh", data=f"touch {MARK}".encode()),
    }
    for name, member in added.items():

        def add(folder: Path, member: Any = member) -> list[str]:
            shards = make_shards(folder, num_users=8, users_per_shard=8)
            _rewrite(shards, lambda members: members.insert(1, member))
            return ["data", "verify", str(shards), "--workers", "0"]

        yield Hostile(kind="tar", name=f"holds {name}", make=add)
    for name, change in {
        "no history": lambda members: members.pop(_place(members, "json")),
        "no image": lambda members: members.pop(_place(members, "webp")),
        "history not json": lambda members: _replace(members, "json", lambda _: b"{"),
        "history nested 100,000 deep": lambda members: _replace(members, "json", lambda _: b"[" * 100_000),
        "history of another user": lambda members: _replace(
            members, "json", lambda data: data.replace(b"u000000", b"u000009")
        ),
        "image is text": lambda members: _replace(members, "webp", lambda _: b"text"),
        "image a bomb": lambda members: _replace(members, "webp", lambda _: _png(60_000, 60_000)),
    }.items():

        def alter(folder: Path, change: Any = change) -> list[str]:
            shards = make_shards(folder, num_users=8, users_per_shard=8)
            _rewrite(shards, change)
            return ["data", "verify", str(shards), "--workers", "0"]

        yield Hostile(kind="tar", name=name, make=alter)
    for name, place, value in (
        ("a size field of 9s", 124, b"77777777777"),
        ("a binary size of 2**60", 124, b"\x80" + b"\x00" * 3 + struct.pack(">Q", 1 << 60)),
        ("a negative binary size", 124, b"\xff" * 12),
        ("a broken checksum", 148, b"0000000\x00"),
        ("a name that is not utf-8", 0, b"\xff\xfe\xfd"),
        ("zeros in the middle", 0, b"\x00" * 512),
    ):

        def patch(folder: Path, place: int = place, value: bytes = value) -> list[str]:
            shards = make_shards(folder, num_users=8, users_per_shard=8)
            path = shards / "train-000000.tar"
            data = bytearray(path.read_bytes())
            data[place : place + len(value)] = value
            path.write_bytes(data)
            return ["data", "verify", str(shards), "--workers", "0"]

        yield Hostile(kind="tar", name=name, make=patch)
