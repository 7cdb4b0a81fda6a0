"""The image features that stages vqa and probe work from: each image of a split goes through the tower once.

LoRA sits in the language model only, so both stages share one file per split in ``<workdir>/features``; it
names the model and the shards it was made from and is made again when either changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from prefgen.config import resolve_path
from prefgen.config_mllm import MLLMConfig
from prefgen.data.index import index_hash
from prefgen.data.reader import ShardReader, UserSample, decode_image
from prefgen.data.remote import RemoteFolder
from prefgen.errors import DataError
from prefgen.lineage import hash_folder
from prefgen.models.mllm import MLLM
from prefgen.models.questions import UserRows
from prefgen.schema import SIDES, Side, Split
from prefgen.whole_file import whole_file

logger = logging.getLogger(__name__)

CHUNK = 512
"""Images decoded and encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class SplitFeatures:
    """Users of a split and the features of all their images.

    Attributes:
        users: each with the row of its first image.
        features: (images, tokens_per_image, D) float16 on the CPU.
    """

    users: tuple[UserRows, ...]
    features: Tensor


def model_hash(path: str) -> str:
    """Hash of a local model folder; the name itself for a hub id."""
    folder = resolve_path(path)
    return hash_folder(folder) if folder.is_dir() else f"hub:{path}"


def load_mllm(model: MLLMConfig) -> MLLM:
    """The MLLM that a stage's ``model`` section describes.

    Raises:
        CheckpointError: see :meth:`MLLM.load`.
    """
    return MLLM.load(
        model_source(model.mllm),
        dtype=getattr(torch, model.frozen_dtype),
        attention=model.attention,
        family=model.family,
        quantization=model.quantization,
    )


def model_source(path: str) -> Path | str:
    """What ``from_pretrained`` is given: a local folder, or a hub id as it is written."""
    folder = resolve_path(path)
    return folder if path.startswith("asset:") or folder.exists() else path


def load_features(
    mllm: MLLM,
    *,
    shards: Path | RemoteFolder,
    split: Split,
    mllm_hash: str,
    cache: Path | None,
    in_bf16: bool = False,
    max_users: int = 0,
    users: range | None = None,
    device: torch.device | str = "cpu",
) -> SplitFeatures:
    """Read the features of a split from the cache, or encode its images and write them there.

    Args:
        mllm: the model; moved to ``device`` if images have to be encoded.
        shards: history shards.
        split: which users.
        mllm_hash: names the model in the cache.
        cache: folder of the cache; None keeps nothing on disk.
        in_bf16: encode in bf16, several times faster than in float32.
        max_users: only the first so many users; 0 takes all.
        users: only these, by position (a part of a distributed predict); those beyond the last are left out.
        device: where to encode.

    Raises:
        DataError: no such split, or a bad sample.
    """
    reader = ShardReader(shards, split=split)
    most = min(len(reader), max_users) if max_users else len(reader)
    wanted = range(most) if users is None else range(min(users.start, most), min(users.stop, most))
    made_from = {
        "mllm": mllm_hash,
        "shards": index_hash(shards),
        "encoded_in": "bf16" if in_bf16 else "float32",
    }
    if wanted != range(most) and (whole := _cut(cache, reader=reader, wanted=wanted, made_from=made_from)):
        return whole
    path = cache / _cache_name(split, wanted, total=len(reader)) if cache is not None else None
    found = tuple(read_users(reader, positions=wanted))
    rows = sum(user.num_images for user in found)
    made_from = {**made_from, "users": _users_text(wanted)}
    features = _read(path, made_from=made_from)
    if features is None or len(features) != rows:
        mllm.model.to(device)
        features = _encode(mllm, reader=reader, positions=wanted, total=rows, in_bf16=in_bf16)
        if path is not None:
            _write(path, features=features, made_from=made_from)
    return SplitFeatures(users=found, features=features)


def _cache_name(split: Split, wanted: range, *, total: int) -> str:
    if wanted.start:
        return f"{split}-{wanted.start}-{wanted.stop}.safetensors"
    return f"{split}.safetensors" if len(wanted) == total else f"{split}-{wanted.stop}.safetensors"


def _users_text(wanted: range) -> str:
    return f"{wanted.start}-{wanted.stop}" if wanted.start else str(wanted.stop)


def _cut(
    cache: Path | None, *, reader: ShardReader, wanted: range, made_from: dict[str, str]
) -> SplitFeatures | None:
    """Some users' rows of the whole split's file, if that is there."""
    if cache is None:
        return None
    everyone = range(len(reader))
    path = cache / _cache_name(reader.split, everyone, total=len(reader))
    features = _read(path, made_from={**made_from, "users": _users_text(everyone)})
    if features is None:
        return None
    before = sum(user.num_images for user in read_users(reader, positions=range(wanted.start)))
    found = tuple(read_users(reader, positions=wanted))
    return SplitFeatures(users=found, features=features[before : before + sum(u.num_images for u in found)])


def read_users(reader: ShardReader, *, positions: range) -> Iterator[UserRows]:
    """Some users, with the rows their images have in the features, from 0; no image is kept."""
    rows = 0
    for position in positions:
        user = UserRows(history=_sample(reader, position).history, first_row=rows)
        yield user
        rows += user.num_images


def _sample(reader: ShardReader, position: int) -> UserSample:
    sample = reader[position]
    assert sample is not None  # on_bad="raise"
    return sample


@torch.no_grad()
def _encode(mllm: MLLM, *, reader: ShardReader, positions: range, total: int, in_bf16: bool) -> Tensor:
    images = (image for position in positions for image in user_images(_sample(reader, position)))
    label = f"encoding images ({reader.split})"
    form = mllm.encoder.format
    features = torch.empty(total, form.tokens_per_image, mllm.feature_size, dtype=torch.float16)
    done = 0
    with tqdm(total=total, desc=label, unit="image", disable=total < CHUNK) as bar:
        while chunk := list(islice(images, CHUNK)):
            with torch.autocast(mllm.device.type, dtype=torch.bfloat16, enabled=in_bf16):
                encoded = mllm.encode_images(chunk)
            features[done : done + len(chunk)] = encoded.to(device="cpu", dtype=torch.float16)
            done += len(chunk)
            bar.update(len(chunk))
    if not bool(torch.isfinite(features).all()):
        raise DataError(
            f"features of split {reader.split} overflow float16; check the vision tower's weights"
        )
    return features


def user_images(sample: UserSample, *, sides: Sequence[Side] = SIDES) -> list[Image.Image]:
    """A user's images, by default liked ones, then disliked ones: the order of the feature rows."""
    return [
        decode_image(data, where=sample.image_where(side, position=position))
        for side in sides
        for position, data in enumerate(sample.side(side))
    ]


def _read(path: Path | None, *, made_from: dict[str, str]) -> Tensor | None:
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != made_from:
                return None
            features: Tensor = file.get_tensor("features")
            return features
    except SafetensorError:
        logger.warning("%s is damaged; the images are encoded again", path)
        return None


def _write(path: Path, *, features: Tensor, made_from: dict[str, str]) -> None:
    with whole_file(path, shared=True) as part:
        save_file({"features": features}, part, metadata=made_from)
    logger.info("image features written to %s", path)
