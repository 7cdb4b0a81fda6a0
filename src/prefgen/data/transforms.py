"""Pictures to tensors and back with Pillow and numpy alone: torchvision must not be needed.

A model's own normalisation (CLIP's means, say) stays with its processor; here are sizes and plain ranges.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prefgen.errors import DataError

Range = Literal["signed", "unit"]
Filter = Literal["bicubic", "lanczos", "bilinear", "nearest"]

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


def resize_and_crop(image: Image.Image, *, size: int, resample: Filter = "bicubic") -> Image.Image:
    """Scale the shorter side to ``size`` and cut the middle out: a ``size`` x ``size`` picture.

    Raises:
        DataError: ``size`` is below 1.
    """
    if size < 1:
        raise DataError(f"image size must be at least 1, got {size}")
    width, height = image.size
    if (width, height) == (size, size):
        return image
    # Crop first: scaling first would round the scaled size, and resize(box=..) lets pixels outside bleed in.
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    middle = image.crop((left, top, left + side, top + side))
    return middle.resize((size, size), _FILTERS[resample])


def to_tensor(
    image: Image.Image, *, size: int | None = None, range: Range = "signed", resample: Filter = "bicubic"
) -> Tensor:
    """Picture -> (3, H, W) float32.

    Args:
        image: converted to RGB.
        size: :func:`resize_and_crop` to this size first; ``None`` keeps the picture's.
        range: values in [-1, 1] ("signed", diffusion models) or [0, 1] ("unit").
        resample: filter for resizing.
    """
    if size is not None:
        image = resize_and_crop(image, size=size, resample=resample)
    pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    values = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32) / 255
    return values * 2 - 1 if range == "signed" else values


def to_image(values: Tensor, *, range: Range = "signed") -> Image.Image:
    """(3, H, W) floating values -> picture; the inverse of :func:`to_tensor`, values outside are clipped.

    Raises:
        DataError: another shape.
    """
    if values.ndim != 3 or values.shape[0] != 3:
        raise DataError(f"a picture needs a tensor of shape (3, H, W), got {tuple(values.shape)}")
    unit = values.detach().to("cpu", torch.float32)
    unit = (unit + 1) / 2 if range == "signed" else unit
    pixels = (unit.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy())


def stack_images(
    images: list[Image.Image], *, size: int, range: Range = "signed", resample: Filter = "bicubic"
) -> Tensor:
    """Pictures -> (N, 3, size, size) float32; see :func:`to_tensor`.

    Raises:
        DataError: no pictures.
    """
    if not images:
        raise DataError("no pictures to stack")
    return torch.stack([to_tensor(image, size=size, range=range, resample=resample) for image in images])
