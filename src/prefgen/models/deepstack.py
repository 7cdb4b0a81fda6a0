"""DeepStack (Qwen3-VL): images are also added to the hidden states after the first layers.

Such families carry several vectors of the hidden size a token in their image features: the first goes into
the image's slots, the others are added behind layer 1, 2, .. at the same tokens. Other families have nothing
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prefgen.models.packing import PackedBatch


@dataclass(frozen=True)
class DeepStack:
    """What is added for one packed batch.

    Attributes:
        added: (B * T, streams * D), zero except at images; None if nothing is added.
        at_images: (B * T,) which tokens are images.
        hidden_size: D.
    """

    added: Tensor | None
    at_images: Tensor | None
    hidden_size: int

    @staticmethod
    def of(batch: PackedBatch, *, image_features: Tensor, like: Tensor) -> DeepStack:
        """Take it from features (N, K, F) for token embeddings ``like`` (B, T, D)."""
        size = like.shape[-1]
        extra = image_features.shape[-1] - size
        if extra <= 0 or batch.image_rows.numel() == 0:
            return DeepStack(None, None, size)
        slots = batch.image_slots.reshape(-1)
        chosen = image_features[batch.image_rows.to(image_features.device)][..., size:].to(like)
        zeros = like.new_zeros(batch.input_ids.numel(), extra)
        at_images = batch.input_ids.new_zeros(batch.input_ids.numel()).bool()
        at_images[slots] = True
        return DeepStack(zeros.index_copy(0, slots, chosen.reshape(-1, extra)), at_images, size)

    def arguments(self, tokens: Tensor | None = None, *, shape: tuple[int, ...] = ()) -> dict[str, Any]:
        """What the language model is told beside the embeddings of the tokens with these flat numbers (n, t).

        Without ``tokens`` it runs over all, as ``shape`` (B, T).
        """
        if self.added is None or self.at_images is None:
            return {}
        images = self.at_images.view(shape) if tokens is None else self.at_images[tokens]
        added = self.added.view(*shape, -1) if tokens is None else self.added[tokens]
        streams = added[images].chunk(added.shape[-1] // self.hidden_size, dim=-1)
        return {"visual_pos_masks": images, "deepstack_visual_embeds": list(streams)}
