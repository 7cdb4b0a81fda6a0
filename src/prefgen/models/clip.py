"""The whole CLIP of a pipeline folder: its text and image encoders, joined by two small tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from prefgen.errors import CheckpointError
from prefgen.models.image_encoder import ImageEncoder
from prefgen.models.loading import quiet_loading

JOIN_FILE = "clip_projection.safetensors"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Text and images in one space.

    Attributes:
        text_encoder: ``CLIPTextModel``.
        tokenizer: its tokenizer.
        image_encoder: with its own projection.
        text_projection: (Dimage, Dtext).
        logit_scale: natural logarithm of the temperature's inverse.
    """

    text_encoder: Any
    tokenizer: Any
    image_encoder: ImageEncoder
    text_projection: Tensor
    logit_scale: float

    @staticmethod
    def load(folder: Path, *, dtype: torch.dtype = torch.float32) -> Clip:
        """Read from a pipeline folder that carries ``clip_projection.safetensors``.

        Raises:
            CheckpointError: the folder has no such file: its encoders were not one CLIP.
        """
        join = folder / JOIN_FILE
        if not join.is_file():
            raise CheckpointError(f"no {JOIN_FILE} at {folder}; its text and image encoders are not one CLIP")
        tensors = load_file(join)
        with quiet_loading():
            text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
        return Clip(
            text_encoder=text.requires_grad_(False),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            image_encoder=ImageEncoder.load(folder / "image_encoder", dtype=dtype),
            text_projection=tensors["text_projection.weight"].to(dtype),
            logit_scale=float(tensors["logit_scale"]),
        )

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """(B,Dimage) of unit length."""
        ids = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
        pooled: Tensor = self.text_encoder(ids).pooler_output
        return nn.functional.normalize((pooled @ self.text_projection.T).float(), dim=-1)

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """(B,Dimage) of unit length."""
        return nn.functional.normalize(self.image_encoder.embed(images).float(), dim=-1)

    def similarity(self, images: list[Image.Image], *, texts: list[str]) -> Tensor:
        """Cosine of each picture with its own text (B,): CLIP-T."""
        return (self.embed_images(images) * self.embed_texts(texts)).sum(dim=-1)
