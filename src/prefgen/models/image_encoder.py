"""The diffusion pipeline's image encoder (e_img) alone, without loading the pipeline around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from prefgen.errors import DataError
from prefgen.models.loading import quiet_loading

BATCH_SIZE = 64
"""Images per pass."""


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """``CLIPVisionModelWithProjection`` and its preprocessing."""

    model: Any
    feature_extractor: Any

    @staticmethod
    def load(
        path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> ImageEncoder:
        """Load a folder; its preprocessing lies in it or, as in a pipeline, in a folder beside it.

        Raises:
            DataError: nothing loadable there.
        """
        beside = path.parent / "feature_extractor"
        own = (path / "preprocessor_config.json").is_file() or not beside.is_dir()
        try:
            with quiet_loading():
                model = CLIPVisionModelWithProjection.from_pretrained(path, dtype=dtype)
                extractor = CLIPImageProcessorPil.from_pretrained(path if own else beside)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise DataError(f"no CLIP image encoder at {path}: {reason}") from None
        return ImageEncoder(model=model.to(device).eval(), feature_extractor=extractor)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, Dimage) float32 on the CPU; a folder of thousands goes through in batches."""
        parts = [
            self._embed_batch(images[start : start + BATCH_SIZE])
            for start in range(0, len(images), BATCH_SIZE)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, int(self.model.config.projection_dim))

    def _embed_batch(self, images: Sequence[Image.Image]) -> Tensor:
        values = self.feature_extractor([i.convert("RGB") for i in images], return_tensors="pt")
        pixels = values["pixel_values"].to(device=self.model.device, dtype=self.model.dtype)
        return cast(Tensor, self.model(pixels).image_embeds).float().cpu()
