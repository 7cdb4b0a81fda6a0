"""Pictures of the base model, kept for the next evaluation that draws the same ones.

Another adapter or strength changes nothing about what the base model draws, and on a CPU that is half of an
ablation's time. A file is named by everything that its pictures follow from, so that figures are the same
whether it was there or not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefgen.config import resolve_path
from prefgen.errors import CheckpointError
from prefgen.lineage import hash_file, hash_json
from prefgen.models.artefact_file import ArtefactKind
from prefgen.models.pixels import from_uint8, to_uint8
from prefgen.study.config import EvaluateConfig

logger = logging.getLogger(__name__)

KIND = ArtefactKind(name="kept drawings", key="prefgen_drawings", version=1, stage="inject", shared=True)
PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
"""Folders of a pipeline that a picture follows from."""
MAX_BYTES = 1 << 30
"""Larger sets are drawn anew: 300 pictures of 1024 x 1024."""


@dataclass(frozen=True, kw_only=True)
class KeptDrawings:
    """A folder of drawings without a user.

    Attributes:
        folder: where they are; made when something is kept.
        made_by: what pictures follow from beside what is asked for: models, number formats, libraries.
    """

    folder: Path
    made_by: dict[str, Any]

    def find_or_draw(
        self, draw: Callable[[], Tensor], *, asked: dict[str, Any], progress: Callable[[int], object]
    ) -> Tensor:
        """(B,3,H,W) in [-1,1], rounded to 8 bits.

        Args:
            draw: makes them; reports its own progress.
            asked: prompts, seeds and settings as plain values.
            progress: called with the number of pictures found.
        """
        made_from = {"made_by": self.made_by, "asked": asked}
        path = self.folder / f"drawn-{hash_json(made_from)[:16]}.safetensors"
        found = _read(path, made_from=made_from)
        if found is not None:
            logger.info("%d pictures of the base model are taken from %s", len(found), path)
            progress(len(found))
            return found
        pixels = draw()
        _keep(path, pixels=pixels, made_from=made_from)
        return pixels


def kept_drawings(config: EvaluateConfig) -> KeptDrawings | None:
    """Those of an evaluation, beside its image features; None without a folder or for a pipeline on a hub.

    Args:
        config: with its ``auto`` settled.
    """
    pipeline = resolve_path(config.model.pipeline)
    if not config.data.feature_cache or not (pipeline / "model_index.json").is_file():
        return None
    parts = [file for part in PARTS for file in sorted((pipeline / part).glob("*")) if file.is_file()]
    files = [pipeline / "model_index.json", *parts]
    made_by = {
        "pipeline": hash_json([[str(file.relative_to(pipeline)), hash_file(file)] for file in files]),
        "precision": config.model.precision,
        "device": config.model.device,
        "memory_format": config.model.memory_format,
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("prefgen", "torch", "diffusers", "transformers")},
    }
    return KeptDrawings(folder=Path(config.data.feature_cache), made_by=made_by)


def _read(path: Path, *, made_from: dict[str, Any]) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        header, tensors = KIND.read(path)
    except CheckpointError as error:
        logger.warning("%s; the pictures are drawn again", error)
        return None
    return from_uint8(tensors["pixels"].numpy()) if header.get("made_from") == made_from else None


def _keep(path: Path, *, pixels: Tensor, made_from: dict[str, Any]) -> None:
    if pixels.numel() > MAX_BYTES:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        KIND.write(
            path, tensors={"pixels": torch.from_numpy(to_uint8(pixels))}, header={"made_from": made_from}
        )
    except OSError as error:
        logger.warning("cannot keep %s (%s); the next evaluation draws again", path, error.strerror)
