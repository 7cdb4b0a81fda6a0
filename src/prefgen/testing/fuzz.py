"""Fuzz targets: bytes go in, and nothing but a PrefgenError may come out. For hypothesis and for atheris."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefgen.config import load_config
from prefgen.data.embeddings import from_npy
from prefgen.data.images import decode_image
from prefgen.data.index import INDEX_NAME, read_index
from prefgen.data.reader import ShardReader
from prefgen.data.shards import read_histories
from prefgen.errors import PrefgenError
from prefgen.profile import ProfileCounts, UserProfile
from prefgen.testing.data import make_history, make_shards


@lru_cache(maxsize=1)
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="prefgen-fuzz-"))


@lru_cache(maxsize=1)
def _shards() -> Path:
    return make_shards(_folder() / "set", num_users=4, num_liked=2, num_disliked=1, users_per_shard=4)


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def history(data: bytes) -> None:
    """``history.jsonl``."""
    for _ in read_histories(_file("history.jsonl", data)):
        pass


def index(data: bytes) -> None:
    """``index.json``."""
    read_index(_file(INDEX_NAME, data))


def shard(data: bytes) -> None:
    """A tar file under an index of the same size: every sample is read."""
    path = _shards() / "train-000000.tar"
    size = path.stat().st_size
    path.write_bytes(data[:size].ljust(size, b"\0"))
    reader = ShardReader(_shards(), split="train")
    for position in range(len(reader)):
        try:
            sample = reader.read(position)
        except PrefgenError:
            continue
        for picture in (*sample.liked, *sample.disliked):
            try:
                decode_image(picture, where="fuzz")
            except PrefgenError:
                continue


def profile(data: bytes) -> None:
    """A profile file."""
    UserProfile.load(_file("me.safetensors", data))


def config(data: bytes) -> None:
    """A configuration file."""
    load_config("align", file=_file("config.yaml", data))


def override(data: bytes) -> None:
    """One word of a command line."""
    load_config("align", overrides=[data.decode("utf-8", "replace")])


def npy(data: bytes) -> None:
    """An array of an embedding shard."""
    from_npy(data, where="fuzz")


def image(data: bytes) -> None:
    """An image as builders read it."""
    decode_image(data, where="fuzz", any_format=True)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (history, index, shard, profile, config, override, npy, image)
}


def feed(name: str, data: bytes) -> bool:
    """Whether a target took the bytes as good; anything but a PrefgenError passes through."""
    try:
        TARGETS[name](data)
    except PrefgenError:
        return False
    return True


@lru_cache(maxsize=16)
def good(name: str) -> bytes:
    """Bytes that the target takes, to begin from."""
    import json

    import torch

    from prefgen.data.embeddings import to_npy

    if name == "history":
        return json.dumps(make_history(0, num_liked=2, num_disliked=1)[0].to_json()).encode() + b"\n"
    if name == "index":
        return (_shards() / INDEX_NAME).read_bytes()
    if name == "shard":
        return (_shards() / "train-000000.tar").read_bytes()
    if name == "profile":
        names = (
            "core_embeds",
            "sem_embeds",
            "core_negative",
            "sem_negative",
            "image_embeds",
            "image_negative",
        )
        tensors: dict[str, Any] = {
            part: torch.ones(4) for part in (*names, "image_mean", "image_mean_negative")
        }
        counts = ProfileCounts(liked=1, disliked=1, draws=1)
        path = _folder() / "good.safetensors"
        UserProfile(**tensors, counts=counts, likes="warm palette").save(path)
        return path.read_bytes()
    if name == "config":
        return b"seed: 3\ntrainer:\n  max_steps: 10\n  precision: 32-true\nalign: {multipliers: [0.5, 1.0]}\n"
    if name == "override":
        return b"trainer.max_steps=10"
    if name == "npy":
        return to_npy(torch.ones(2, 3).numpy())
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, "PNG")
    return buffer.getvalue()
