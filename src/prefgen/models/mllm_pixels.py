"""Pictures to the square of pixels that an MLLM's vision tower sees: one size for all pictures of a model.

One size means one number of tokens for every image, so that features can be cached as one tensor. A picture
of another shape is made square by its family's stock processor (Idefics3, SmolVLM: stretched), or else by
padding it with the processor's mean colour and resizing (as LLaVA-OneVision's stock processor treats one of
several images; for the other families the padding is our choice: their stock processors would keep the shape
and give every image another number of tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prefgen.errors import DataError

Squaring = Literal["stock", "pad"]


@dataclass(frozen=True, kw_only=True)
class PixelMaker:
    """Makes normalised pixels; plain enough to travel to worker processes.

    Attributes:
        processor: the family's image processor on PIL: mean, deviation, scale, resampling are read from it.
        side: side of the square in pixels.
        squaring: how a picture of another size becomes the square.
    """

    processor: Any
    side: int
    squaring: Squaring

    def __call__(self, images: Sequence[Image.Image] | NDArray[Any]) -> Tensor:
        """(N, 3, side, side) float32 of PIL pictures or uint8 (N, side, side, 3).

        Raises:
            DataError: an array of another type or shape.
        """
        side = self.side
        if not isinstance(images, np.ndarray):
            if any(image.size != (side, side) for image in images):
                if self.squaring == "stock":
                    nested = [[image.convert("RGB")] for image in images]
                    pixels: Tensor = self.processor(nested, return_tensors="pt")["pixel_values"]
                    return pixels[:, 0]
                images = [self._square(image.convert("RGB")) for image in images]
            images = np.stack([np.asarray(image.convert("RGB")) for image in images])
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            raise DataError(
                f"pixels: expected uint8 (N, {side}, {side}, 3), got {images.dtype} {tuple(images.shape)}"
            )
        raw = torch.from_numpy(images).permute(0, 3, 1, 2).float() * self.processor.rescale_factor
        mean = torch.tensor(self.processor.image_mean)[:, None, None]
        std = torch.tensor(self.processor.image_std)[:, None, None]
        normalised: Tensor = (raw - mean) / std
        return normalised

    def _square(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        longest = max(width, height)
        if width != height:
            colour = tuple(int(value * 255) for value in self.processor.image_mean)
            canvas = Image.new("RGB", (longest, longest), colour)
            canvas.paste(image, ((longest - width) // 2, (longest - height) // 2))
            image = canvas
        if longest == self.side:
            return image
        return image.resize((self.side, self.side), Image.Resampling(int(self.processor.resample)))
