"""Broken and malicious inputs, each with the command or the reader that meets it."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefgen.testing.hostile_case import EVIL, MARK, Evil, Hostile
from prefgen.testing.hostile_data import data_inputs


def all_inputs() -> Iterator[Hostile]:
    """Every input, in groups."""
    yield from data_inputs()
    yield from _configs()
    yield from _command_lines()
    yield from _profiles()
    yield from _checkpoints()
    yield from _arrays()
    yield from _parts()


# configuration and command line


def _fit(folder: Path, text: bytes) -> list[str]:
    path = folder / "config.yaml"
    path.write_bytes(text)
    return ["fit", "--stage", "align", "--config", str(path), "--dry-run"]


def _configs() -> Iterator[Hostile]:
    bomb = b"a: &a {x: 1}\n" + b"".join(
        f"{b}: &{b} {{p: *{a}, q: *{a}, r: *{a}, s: *{a}}}\n".encode()
        for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=True)
    )
    texts = {
        "code in a tag": f"!!python/object/apply:os.system ['touch {MARK}']".encode(),
        "code in a value": f"seed: !!python/object/apply:os.system ['touch {MARK}']".encode(),
        "a new object": b"seed: !!python/object/new:os.popen ['id']",
        "aliases for a billion": bomb,
        "an alias of itself": b"data: &a {b: *a}",
        "nested 10,000 deep": b"{a: " * 10_000,
        "10,000 brackets": b"seed: " + b"[" * 10_000,
        "a list": b"- 1\n- 2",
        "text": b"hello",
        "not utf-8": b"seed: \xff",
        "a NUL byte": b"seed: \x00",
        "a tab": b"trainer:\n\tmax_steps: 3",
        "a key twice": b"seed: 1\nseed: 2",
        "a number as key": b"1: 2",
        "a list as key": b"? [a]\n: b",
        "unknown key": b"sead: 1",
        "a section as value": b"seed: {a: 1}",
        "a value as section": b"trainer: 3",
        "text for a number": b"trainer: {max_steps: many}",
        "not a number": b"optim: {learning_rate: nan}",
        "an unknown choice": b"trainer: {precision: 128-true}",
        "a value that points to itself": b"seed: ${seed}",
        "a value that points nowhere": b"workdir: ${nowhere}",
        "an unknown resolver": b"workdir: ${oc.popen:id}",
        "2 MB": b"# " + b"x" * (2 << 20),
    }
    for name, text in texts.items():
        yield Hostile(kind="configuration", name=name, make=partial(_fit, text=text))
    for name, path in {"/dev/zero": "/dev/zero", "a folder": "/", "no file": "/none.yaml"}.items():
        words = ["fit", "--stage", "align", "--config", path, "--dry-run"]
        yield Hostile(kind="configuration", name=name, make=partial(_just, words=words))


def _just(folder: Path, *, words: list[str]) -> list[str]:
    del folder
    return words


def _command_lines() -> Iterator[Hostile]:
    for words in (
        ["fit", "--stage", "algin"],
        ["fit", "--stage", "../align"],
        ["fit", "--stage", "align", "--preset", "../../etc"],
        ["fit", "--stage", "align", "seed"],
        ["fit", "--stage", "align", "=1"],
        ["fit", "--stage", "align", "seed=1", "seed=2"],
        ["fit", "--stage", "align", "seed=1e400"],
        ["fit", "--stage", "align", "data.__class__=x"],
        ["fit", "--stage", "align", "model.pipeline=asset:../../../etc", "--dry-run=1"],
        ["fit", "--stage", "align", "data.embeddings=pipe:id"],
        ["fit", "--stage", "align", "data.embeddings=file:///etc"],
        ["frobnicate"],
        ["data", "build", "--history", "pipe:id", "--out", "x"],
        ["data", "build", "--history", "/dev/null", "--out", "/dev/null/x"],
        ["data", "inspect", "http://127.0.0.1:9/"],
        ["data", "verify", "s3://bucket/x"],
        ["data", "merge", "nowhere"],
        ["data", "build", "--history", "x", "--out", "y", "--part", "9/3"],
    ):
        yield Hostile(kind="command line", name=" ".join(words), make=partial(_just, words=words))


# profiles, checkpoints, arrays, parts


def _profiles() -> Iterator[Hostile]:
    def header(record: object, *, body: bytes = b"") -> bytes:
        text = json.dumps(record).encode()
        return struct.pack("<Q", len(text)) + text + body

    contents = {
        "empty": b"",
        "text": b"a profile, believe me",
        "a pickle": EVIL,
        "a header of 2**60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
        "a header that is no json": struct.pack("<Q", 4) + b"[[[[",
        "a header nested 100,000 deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
        "no tensors": header({}),
        "a tensor beyond the end": header(
            {"core_embeds": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
        ),
        "a tensor of 2**50 numbers": header(
            {"core_embeds": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 16]}}, body=b"\0" * 16
        ),
        "an unknown number format": header(
            {"core_embeds": {"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]}}, body=b"\0" * 16
        ),
        "metadata that is no profile's": header({"__metadata__": {"x": "y"}}),
        "a profile header that is a list": header({"__metadata__": {"prefgen_profile": "[]"}}),
    }
    for name, data in contents.items():

        def make(folder: Path, data: bytes = data) -> list[str]:
            path = folder / "me.safetensors"
            path.write_bytes(data)
            return ["profile", "show", str(path)]

        yield Hostile(kind="profile", name=name, make=make)
    yield Hostile(kind="profile", name="a flipped bit", make=_flipped_profile)
    for name, path in {"a folder": "/", "no file": "/none", "/dev/zero": "/dev/zero"}.items():
        words = ["profile", "show", path]
        yield Hostile(kind="profile", name=name, make=partial(_just, words=words))


def _flipped_profile(folder: Path) -> list[str]:
    from prefgen.profile import TENSORS, ProfileCounts, UserProfile

    path = folder / "me.safetensors"
    tensors: dict[str, Any] = {name: torch.ones(3) for name in TENSORS}
    UserProfile(**tensors, counts=ProfileCounts(liked=1, disliked=1, draws=1)).save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return ["profile", "show", str(path)]


def _checkpoints() -> Iterator[Hostile]:
    def saved(content: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    def foreign_zip() -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("archive/data.pkl", EVIL)
        return buffer.getvalue()

    contents: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "a bare pickle": lambda: EVIL,
        "a pickle in a zip": foreign_zip,
        "an object that runs code": lambda: saved({"state_dict": {}, "callbacks": Evil()}),
        "a whole module": lambda: saved({"state_dict": torch.nn.Linear(2, 2)}),
        "a tensor alone": lambda: saved(torch.zeros(3)),
        "no state_dict": lambda: saved({"weights": {}}),
        "another stage's": lambda: saved({"state_dict": {}, "hyper_parameters": {"stage": "inject"}}),
        "half": lambda: saved({"state_dict": {"a": torch.zeros(1000)}})[:2000],
    }
    for name, content in contents.items():

        def make(folder: Path, content: Callable[[], bytes] = content) -> Callable[[], object]:
            from prefgen.checkpoint import read_checkpoint

            path = folder / "step-00000001.ckpt"
            path.write_bytes(content())
            return lambda: read_checkpoint(path, stage="align")

        yield Hostile(kind="checkpoint", name=name, make=make)


def _arrays() -> Iterator[Hostile]:
    def npy(array: Any, **options: Any) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, **options)
        return buffer.getvalue()

    def head(text: str) -> bytes:
        data = text.encode().ljust(117) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(data)) + data

    contents = {
        "pickled objects": npy(np.array([Evil()], dtype=object), allow_pickle=True),
        "float64": npy(np.zeros((2, 2))),
        "terabytes promised": head("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"),
        "a negative shape": head("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
        "code in the header": head(f"__import__('os').system('touch {MARK}')"),
        "brackets": head("(" * 100),
        "no header": b"\x93NUMPY\x01\x00",
        "empty": b"",
    }
    for name, data in contents.items():

        def make(folder: Path, data: bytes = data) -> Callable[[], object]:
            from prefgen.data.embeddings import from_npy

            return lambda: from_npy(data, where=str(folder))

        yield Hostile(kind="npy", name=name, make=make)


def _parts() -> Iterator[Hostile]:
    for name, data in {
        "a part of null": b"null",
        "a part of text": b"part",
        "a part that names a path": b'{"schema_version": 1, "kind": "histories", "header": {}, '
        b'"dropped": {}, '
        b'"splits": {"train": {"counts": {}, "shards": [{"name": "../x.tar"}]}}}',
    }.items():

        def make(folder: Path, data: bytes = data) -> list[str]:
            (folder / ".parts").mkdir(parents=True)
            (folder / ".parts" / "index.part-0000-of-0001.json").write_bytes(data)
            return ["data", "merge", str(folder)]

        yield Hostile(kind="part index", name=name, make=make)
