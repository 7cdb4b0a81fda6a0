"""Pictures and pixels: one scale, one rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_uint8(pixels: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(B,H,W,3) bytes of pixels (B,3,H,W) in [-1,1], rounded as the stock pipeline rounds."""
    unit = (pixels.float() * 0.5 + 0.5).clamp(0, 1)
    array: np.ndarray[Any, Any] = unit.cpu().permute(0, 2, 3, 1).numpy()
    return (array * 255).round().astype(np.uint8)


def from_uint8(array: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """Pixels (B,3,H,W) in [-1,1] of bytes (B,H,W,3)."""
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Pictures of pixels (B,3,H,W) in [-1,1]."""
    return [Image.fromarray(array) for array in to_uint8(pixels)]


def to_pixels(images: Sequence[Image.Image], *, size: tuple[int, int]) -> Tensor:
    """Pixels (B,3,H,W) in [-1,1] of pictures, resized to cover ``size`` (H,W) and cut at the centre."""
    rows = []
    for image in images:
        rows.append(np.asarray(_cover(image.convert("RGB"), size=size), dtype=np.float32))
    pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
    return (pixels / 127.5 - 1).contiguous()


def _cover(image: Image.Image, *, size: tuple[int, int]) -> Image.Image:
    height, width = size
    if image.size == (width, height):
        return image
    factor = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
