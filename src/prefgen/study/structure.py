"""What the projector keeps of who resembles whom, on the test users' embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from prefgen.data.embeddings import EmbeddingReader
from prefgen.data.sampling import rng_for
from prefgen.evaluate.alignment import neighbourhood_overlap, separability
from prefgen.evaluate.structure import linear_cka, user_cosines
from prefgen.models.projector import load_projector
from prefgen.models.text import TextEncoderName, TextPooling, TextSpace

MAX_USERS = 256
NUM_NEIGHBOURS = 10


@torch.no_grad()
def structure_figures(
    embeddings: Path, *, projector: Path, pipeline: Path, seed: int, num_resamples: int
) -> dict[str, Any]:
    """Cosines within and between users, CKA and neighbours before and after, aligned against texts.

    Returns:
        ``cosines`` (core, sem, aligned -> within, between, gap), where every user has two draws;
        ``cka`` and ``neighbourhood_overlap`` of sem and aligned, with ``overlap_chance``; ``separability`` of
        aligned and text embeddings, where attributes are known; ``num_users``.
    """
    reader = EmbeddingReader(embeddings, split="test")
    users = [reader.read(i) for i in range(min(MAX_USERS, len(reader)))]
    loaded = load_projector(projector)
    core, sem = ([torch.from_numpy(getattr(user, name)) for user in users] for name in ("core", "sem"))
    aligned = [loaded.projector(rows) for rows in sem]
    figures: dict[str, Any] = {"num_users": len(users)}
    if len(users) > 1 and min(len(rows) for rows in sem) > 1:
        figures["cosines"] = {
            name: asdict(user_cosines(rows, seed=seed, num_resamples=num_resamples))
            for name, rows in (("core", core), ("sem", sem), ("aligned", aligned))
        }
    if len(users) > 2:
        before, after = (torch.stack([rows[0] for rows in side]) for side in (sem, aligned))
        count = min(NUM_NEIGHBOURS, len(users) - 1)
        figures["cka"] = linear_cka(before, after)
        figures["neighbourhood_overlap"] = neighbourhood_overlap(before, after, num_neighbours=count)
        figures["overlap_chance"] = count / (len(users) - 1)
        if all(user.liked_attributes for user in users):
            space = _text_space(pipeline, text=loaded.text)
            lists = [
                space.draw_list(
                    user.liked_attributes,
                    rng=rng_for(seed=seed, epoch=0, key=user.user_id, purpose="structure"),
                )
                for user in users
            ]
            figures["separability"] = separability(after, space.encode(lists), seed=seed)
    return figures


def _text_space(pipeline: Path, *, text: Mapping[str, str]) -> TextSpace:
    return TextSpace.load(
        pipeline,
        part=cast(TextEncoderName, text.get("text_encoder", "text_encoder")),
        pooling=cast(TextPooling, text.get("text_pooling", "pooled")),
    )
