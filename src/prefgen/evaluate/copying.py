"""How near a drawn picture is to the nearest one its user has shown: small numbers mean copying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Distance = Literal["pixels", "embedding"]


def nearest_distances(pictures: Tensor, *, histories: Sequence[Tensor], distance: Distance) -> Tensor:
    """Distance of each picture to the nearest of its own user's images.

    Args:
        pictures: (B,..) pixels in [-1,1], or image embeddings.
        histories: for each picture the (N,..) images of its user, N >= 1.
        distance: ``pixels`` is the root mean square difference, 0 to 2; ``embedding`` is one minus the
            cosine, 0 to 2.

    Returns:
        (B,) float64.
    """
    rows = []
    for picture, history in zip(pictures, histories, strict=True):
        one, many = picture.double().flatten()[None], history.double().flatten(1)
        if distance == "pixels":
            values = (many - one).pow(2).mean(dim=1).sqrt()
        else:
            values = 1 - torch.cosine_similarity(one, many, dim=1)
        rows.append(values.min())
    return torch.stack(rows)


def nearest_to_each_other(images: Tensor, *, distance: Distance) -> Tensor:
    """(N,) distance of each image to the nearest OTHER one of the same history: the natural yardstick."""
    rest = [torch.cat([images[:i], images[i + 1 :]]) for i in range(len(images))]
    return nearest_distances(images, histories=rest, distance=distance)
