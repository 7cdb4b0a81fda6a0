"""Synthetic histories, images, shards and embedding shards for tests: small, real files with a taste in them.

Each user likes one hue and dislikes another, and the pictures show it, so tests may learn from them.
"""

from __future__ import annotations

import colorsys
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prefgen.data.embeddings import EmbeddingWriter, UserEmbeddings
from prefgen.data.images import encode_webp
from prefgen.data.sampling import draw_references, rng_for
from prefgen.data.shards import read_histories, write_shards
from prefgen.errors import DataError
from prefgen.schema import RatedImage, Split, UserHistory, image_key

HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
SUBJECTS = ("fox", "boat", "apple", "tower", "cup")


def make_image(hue: int, *, size: int = 24, rng: np.random.Generator) -> Image.Image:
    """An RGB picture of ``size`` x ``size``: noise tinted with hue number 0 .. 5."""
    tint = np.asarray(colorsys.hsv_to_rgb(hue / len(HUES), 0.9, 1.0))
    pixels = rng.uniform(0.5, 1.0, size=(size, size, 1)) * tint * 255
    return Image.fromarray(pixels.astype(np.uint8))


def make_history(
    user: int, *, num_liked: int = 5, num_disliked: int = 4, split: Split | None = None, seed: int = 0
) -> tuple[UserHistory, list[Image.Image]]:
    """A history and its pictures (liked first, then disliked), in the order of the two sides."""
    rng = rng_for(seed=seed, epoch=0, key=str(user), purpose="history")
    liked, disliked = (int(hue) for hue in rng.permutation(len(HUES))[:2])
    user_id = f"u{user:06d}"
    sides: list[tuple[RatedImage, ...]] = []
    pictures: list[Image.Image] = []
    for side, hue, count in (("liked", liked, num_liked), ("disliked", disliked, num_disliked)):
        images = []
        for position in range(count):
            subject = SUBJECTS[int(rng.integers(len(SUBJECTS)))]
            images.append(
                RatedImage(
                    image=f"images/{user_id}-{side}-{position:03d}.webp",
                    prompt=f"a {subject}",
                    attributes=(HUES[hue],),
                )
            )
            pictures.append(make_image(hue, rng=rng))
        sides.append(tuple(images))
    history = UserHistory(
        user_id=user_id,
        source="agent",
        liked=sides[0],
        disliked=sides[1],
        liked_attributes=(HUES[liked],),
        disliked_attributes=(HUES[disliked],),
        split=split,
    )
    return history, pictures


def write_raw(
    folder: Path,
    *,
    num_users: int = 12,
    num_liked: int = 5,
    num_disliked: int = 4,
    splits: bool = True,
    seed: int = 0,
) -> Path:
    """Write ``history.jsonl`` and ``images/*.webp`` and return the history file.

    Of four users the third is of validation and the fourth of test; without ``splits`` no line names one.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names: tuple[Split, ...] = ("train", "train", "validation", "test")
    lines = []
    for user in range(num_users):
        split = names[user % 4] if splits else None
        history, pictures = make_history(
            user, num_liked=num_liked, num_disliked=num_disliked, split=split, seed=seed
        )
        for image, picture in zip((*history.liked, *history.disliked), pictures, strict=True):
            (folder / image.image).write_bytes(encode_webp(picture))
        lines.append(json.dumps(history.to_json()) + "\n")
    path = folder / "history.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_shards(
    folder: Path,
    *,
    num_users: int = 12,
    num_liked: int = 5,
    num_disliked: int = 4,
    users_per_shard: int = 3,
    max_images_per_sample: int = 64,
    seed: int = 0,
) -> Path:
    """Write ``folder/raw`` (histories) and ``folder/shards`` (all three splits); return the latter."""
    path = write_raw(
        folder / "raw", num_users=num_users, num_liked=num_liked, num_disliked=num_disliked, seed=seed
    )
    out = folder / "shards"
    write_shards(
        read_histories(path),
        root=path.parent,
        out=out,
        users_per_shard=users_per_shard,
        max_images_per_sample=max_images_per_sample,
    )
    return out


def make_embeddings(
    folder: Path,
    *,
    num_users: int = 12,
    num_images: int = 10,
    num_draws: int = 3,
    core_dim: int = 8,
    sem_dim: int = 12,
    image_dim: int = 6,
    header: dict[str, object] | None = None,
    seed: int = 0,
) -> Path:
    """Write embedding shards of synthetic users to ``folder`` and return it.

    Every user has ``num_images`` on either side; its sem and core scatter around a centre of its own, so that
    users can be told apart.
    """
    names: tuple[Split, ...] = ("train", "train", "validation", "test")
    with EmbeddingWriter(folder, header=header or {"mllm": "tiny"}, users_per_shard=4) as writer:
        for user in range(num_users):
            history, _ = make_history(user, num_liked=num_images, num_disliked=num_images, seed=seed)
            rng = rng_for(seed=seed, epoch=0, key=history.user_id, purpose="embeddings")
            writer.add(
                _make_user(
                    history,
                    num_draws=num_draws,
                    dims={"core": core_dim, "sem": sem_dim, "image": image_dim},
                    rng=rng,
                ),
                split=names[user % 4],
            )
        writer.close()
    return folder


def _make_user(
    history: UserHistory, *, num_draws: int, dims: dict[str, int], rng: np.random.Generator
) -> UserEmbeddings:
    count = max(1, min(len(history.liked), len(history.disliked)) // 2)
    draws = [draw_references(history, num_liked=count, num_disliked=count, rng=rng) for _ in range(num_draws)]
    centres = {name: rng.normal(size=dims[name]) for name in ("core", "sem")}

    def cloud(name: str, *, sign: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        noise = 0.2 * rng.normal(size=(num_draws, dims[name]))
        return (sign * centres[name] + noise).astype(np.float32)

    keys = [image_key(history.user_id, "liked", i) for i in range(len(history.liked))]
    keys += [image_key(history.user_id, "disliked", i) for i in range(len(history.disliked))]
    return UserEmbeddings(
        user_id=history.user_id,
        core=cloud("core", sign=1.0),
        sem=cloud("sem", sign=1.0),
        core_negative=cloud("core", sign=-1.0),
        sem_negative=cloud("sem", sign=-1.0),
        reference_keys=tuple(draw.keys(history.user_id) for draw in draws),
        image=rng.normal(size=(len(keys), dims["image"])).astype(np.float32),
        image_keys=tuple(keys),
        prompts=tuple(image.prompt for image in (*history.liked, *history.disliked)),
        liked_attributes=history.liked_attributes,
        disliked_attributes=history.disliked_attributes,
    )


class NumberDataset:
    """Numbers for loader tests: example ``i`` of epoch ``e`` is (``"i@e"``, a (3,) float32 tensor).

    ``bad`` positions raise DataError, ``missing`` ones give None, as a reader with ``on_bad="skip"`` does.
    """

    def __init__(
        self,
        size: int,
        *,
        shard_sizes: tuple[int, ...] = (),
        bad: frozenset[int] = frozenset(),
        missing: frozenset[int] = frozenset(),
    ) -> None:
        self._size = size
        self.shard_sizes = shard_sizes
        self._bad = bad
        self._missing = missing

    def __len__(self) -> int:
        return self._size

    def example(self, index: int, *, epoch: int) -> tuple[str, torch.Tensor] | None:
        """One example, noise included: a pure function of index and epoch."""
        if index in self._bad:
            raise DataError(f"number {index} is bad")
        if index in self._missing:
            return None
        rng = rng_for(seed=0, epoch=epoch, key=str(index), purpose="number")
        return f"{index}@{epoch}", torch.from_numpy(rng.normal(size=3).astype(np.float32))


def collate_numbers(examples: list[tuple[str, torch.Tensor]]) -> tuple[list[str], torch.Tensor]:
    """Keys and a (B, 3) tensor."""
    return [key for key, _ in examples], torch.stack([values for _, values in examples])
