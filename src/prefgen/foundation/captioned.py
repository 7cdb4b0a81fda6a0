"""Captioned pictures from WebDataset shards, decoded once into an array on disk; captions drawn anew."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from prefgen.errors import DataError
from prefgen.whole_file import whole_file, write_json

BARE_LIST_RATE = 0.15
"""Share of captions that are a bare attribute list: without it the text space knows no attribute words."""

EMPTY_RATE = 0.1
"""Share of captions dropped when training for classifier-free guidance."""


@dataclass(frozen=True, kw_only=True)
class Phrases:
    """The phrases of captions as classes, to teach a vision tower to see before it learns to speak.

    Attributes:
        targets: class of each picture in each group, the subject last; shape (N, groups + 1).
        sizes: number of classes of each group, the subjects last.
    """

    targets: npt.NDArray[np.int64]
    sizes: tuple[int, ...]

    def loss(self, logits: Tensor, *, rows: npt.NDArray[np.int64]) -> Tensor:
        """Mean cross-entropy over the groups and the subject.

        Args:
            logits: (B, sum of sizes), group after group.
            rows: the B pictures.
        """
        parts = torch.split(logits.float(), list(self.sizes), dim=1)
        wanted = torch.from_numpy(self.targets[rows])
        losses = [nn.functional.cross_entropy(part, wanted[:, g]) for g, part in enumerate(parts)]
        return torch.stack(losses).mean()

    def accuracy(self, logits: Tensor, *, rows: npt.NDArray[np.int64]) -> list[float]:
        """Share of pictures read right, per group, the subject last."""
        wanted = torch.from_numpy(self.targets[rows])
        parts = torch.split(logits, list(self.sizes), dim=1)
        return [float((part.argmax(1) == wanted[:, g]).float().mean()) for g, part in enumerate(parts)]


@dataclass(frozen=True, kw_only=True)
class CaptionedImages:
    """Pictures with what they show.

    Attributes:
        images: uint8, shape (N, H, W, 3), mapped from disk.
        prompts: subject phrase of each picture.
        attributes: attribute words of each picture.
        families: family of each subject.
        groups: attribute words by group, as the shards' ``attributes.json`` says.
        unseen: prompts that no multimodal LLM may train on (the test subjects).
        fingerprint: short hash of the shards, for the cards.
    """

    images: npt.NDArray[np.uint8]
    prompts: tuple[str, ...]
    attributes: tuple[tuple[str, ...], ...]
    families: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    unseen: frozenset[str]
    fingerprint: str

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.prompts)

    def caption(
        self,
        index: int,
        *,
        rng: np.random.Generator,
        bare_rate: float = BARE_LIST_RATE,
        subject_rate: float = 0.0,
        fewest: int = 0,
    ) -> str:
        """The subject and a random number of its attributes in random order.

        Args:
            index: the picture.
            rng: draws everything.
            bare_rate: share of captions that are attributes alone.
            subject_rate: share of captions that are the subject alone, beside those drawn so anyway.
            fewest: attributes at least beside a subject that is not alone by ``subject_rate``.
        """
        if subject_rate and rng.random() < subject_rate:
            return self.prompts[index]
        words = self.attributes[index]
        order = [words[i] for i in rng.permutation(len(words)).tolist()]
        if rng.random() < bare_rate and order:
            return ", ".join(order[: int(rng.integers(1, len(order) + 1))])
        return ", ".join(
            [self.prompts[index], *order[: int(rng.integers(min(fewest, len(order)), len(order) + 1))]]
        )

    def labels(self) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """Value index per group (N, groups), and the group names."""
        names = tuple(self.groups)
        place = {word: (g, v) for g, name in enumerate(names) for v, word in enumerate(self.groups[name])}
        out = np.zeros((len(self), len(names)), dtype=np.int64)
        for i, words in enumerate(self.attributes):
            for word in words:
                group, value = place[word]
                out[i, group] = value
        return out, names

    def phrases(self) -> Phrases:
        """What each picture shows as classes: its subject, and one value of every group."""
        values, names = self.labels()
        subjects = tuple(sorted(set(self.prompts)))
        place = {prompt: i for i, prompt in enumerate(subjects)}
        subject = np.array([place[prompt] for prompt in self.prompts], dtype=np.int64)
        return Phrases(
            targets=np.concatenate([values, subject[:, None]], axis=1),
            sizes=(*(len(self.groups[name]) for name in names), len(subjects)),
        )

    def subset(self, *, unseen: bool, limit: int | None = None) -> CaptionedImages:
        """Only the pictures of unseen subjects, or only the others; the first ``limit``, in memory."""
        rows = [i for i, prompt in enumerate(self.prompts) if (prompt in self.unseen) == unseen][:limit]
        return replace(
            self,
            images=np.array(self.images[rows]),
            prompts=tuple(self.prompts[i] for i in rows),
            attributes=tuple(self.attributes[i] for i in rows),
            families=tuple(self.families[i] for i in rows),
        )

    def corpus(self, *, count: int, seed: int) -> Iterator[str]:
        """``count`` drawn captions, for training a tokenizer."""
        rng = np.random.default_rng(seed)
        for index in rng.integers(len(self), size=count).tolist():
            yield self.caption(index, rng=rng)


def load_captioned(shards: Path, *, split: str, cache: Path) -> CaptionedImages:
    """Read ``shards/<split>-*.tar``; decoded pixels are kept in ``cache`` and mapped from there next time.

    Raises:
        DataError: no such shards, a sample lacks its picture or caption, or the pictures differ in size.
    """
    tars = sorted(shards.glob(f"{split}-*.tar"))
    if not tars:
        raise DataError(
            f"no shards {split}-*.tar at {shards}; make them with 'prefgen data drawings --out {shards}'"
        )
    fingerprint = hashlib.sha256(
        "".join(f"{tar.name}{tar.stat().st_size}" for tar in tars).encode() + tars[0].read_bytes()
    ).hexdigest()[:16]
    meaning = json.loads((shards / "attributes.json").read_text())
    pixels, about = cache / f"{split}-{fingerprint}.npy", cache / f"{split}-{fingerprint}.json"
    if not (pixels.exists() and about.exists()):
        _decode(tars, pixels=pixels, about=about)
    records = json.loads(about.read_text())
    return CaptionedImages(
        images=np.load(pixels, mmap_mode="r", allow_pickle=False),
        prompts=tuple(record["prompt"] for record in records),
        attributes=tuple(tuple(record["attributes"]) for record in records),
        families=tuple(record.get("family", "") for record in records),
        groups={name: tuple(values) for name, values in meaning["groups"].items()},
        unseen=frozenset(meaning.get("unseen", ())),
        fingerprint=fingerprint,
    )


def _decode(tars: Sequence[Path], *, pixels: Path, about: Path) -> None:
    records: list[dict[str, Any]] = []
    arrays: list[npt.NDArray[np.uint8]] = []
    for sample in tqdm(_samples(tars), unit="image", desc=f"reading {tars[0].parent}"):
        if not {"webp", "json"} <= set(sample):
            raise DataError(f"{sample['__url__']}: sample {sample['__key__']} lacks .webp or .json")
        records.append(json.loads(sample["json"]))
        arrays.append(np.asarray(Image.open(io.BytesIO(sample["webp"])).convert("RGB")))
    if len({array.shape for array in arrays}) != 1:
        raise DataError(f"{tars[0].parent}: pictures differ in size; expected one size for all")
    with whole_file(pixels) as part, part.open("wb") as file:  # np.save would end the name with .npy
        np.save(file, np.stack(arrays))
    write_json(about, content=records, indent=None)


def _samples(tars: Sequence[Path]) -> Iterator[dict[str, Any]]:
    import webdataset

    dataset = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False)
    return cast(Iterator[dict[str, Any]], iter(dataset))
