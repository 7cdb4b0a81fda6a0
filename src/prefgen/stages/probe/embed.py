"""Embedding shards: core and sem of several reference draws a user, and its images' embeddings.

Training users bring embeddings of their liked images only, all others of both sides.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from prefgen.config import resolve_path
from prefgen.data.embeddings import USERS_PER_SHARD, EmbeddingWriter, UserEmbeddings
from prefgen.data.index import read_index
from prefgen.data.parts import WHOLE, Part
from prefgen.data.reader import ShardReader
from prefgen.data.sampling import References as Draw
from prefgen.data.sampling import draw_references, rng_for
from prefgen.lineage import hash_folder, hash_json
from prefgen.models.image_encoder import ImageEncoder
from prefgen.models.mllm import MLLM
from prefgen.models.probes import LayerChoice, choice_to_json
from prefgen.models.questions import UserRows
from prefgen.models.representation import References, embed_references
from prefgen.schema import SIDES, Side, Split, UserHistory, image_key
from prefgen.stages.base import shard_root
from prefgen.stages.features import model_hash, user_images
from prefgen.stages.probe.config import ProbeConfig
from prefgen.stages.probe.data import load_split
from prefgen.stages.probe.draws import Sides, shown_disliked

logger = logging.getLogger(__name__)

LARGEST_SHARE = 0.75
"""Of a side's images at most so much goes into one draw: the rest are targets and anchors of stage inject."""


def model_lineage(config: ProbeConfig) -> dict[str, str]:
    """Hashes of the frozen models whose layers are probed."""
    lora = config.model.lora
    return {
        "mllm": model_hash(config.model.mllm),
        "lora": hash_folder(resolve_path(lora)) if lora else "none",
    }


def probe_lineage(config: ProbeConfig, *, choice: LayerChoice) -> dict[str, str]:
    """Hashes of what core and sem depend on."""
    return {**model_lineage(config), "probe": hash_json(choice_to_json(choice))}


def draw_of(
    history: UserHistory,
    *,
    draw: int,
    num_references: int,
    seed: int,
    sparse: bool = False,
    sides: Sides = "both",
) -> Draw:
    """Reference draw number ``draw`` of a user.

    Args:
        history: the user.
        draw: its number.
        num_references: references of either side.
        seed: of the run.
        sparse: fewer references, of unequal numbers, half the time no disliked one: what a new user begins
            with. Stages that only ever met full histories would be strangers to such a profile.
        sides: which references are kept; the liked ones are the same either way.
    """
    rng = rng_for(seed=seed, epoch=draw, key=history.user_id, purpose="embedding references")
    liked, disliked = (_most(len(side), wanted=num_references) for side in (history.liked, history.disliked))
    if sparse and liked:
        liked = int(rng.integers(1, liked + 1))
        disliked = int(rng.integers(1, disliked + 1)) if disliked and rng.integers(2) else 0
    drawn = draw_references(history, num_liked=liked, num_disliked=disliked, rng=rng)
    return replace(drawn, disliked=shown_disliked(drawn.disliked, liked=drawn.liked, sides=sides))


def write_embeddings(
    config: ProbeConfig, *, mllm: MLLM, choice: LayerChoice, device: torch.device, part: Part = WHOLE
) -> Path:
    """Write all splits of the shards to ``embed.out``, replacing an older set.

    A part writes its contiguous share of the tar files, which :func:`prefgen.data.parts.merge_parts` joins.

    Returns:
        The folder.
    """
    out = resolve_path(config.embed.out)
    encoder_path = resolve_path(config.model.image_encoder)
    encoder = ImageEncoder.load(encoder_path, device=device)
    header = {
        **probe_lineage(config, choice=choice),
        "image_encoder": hash_folder(encoder_path),
        "choice": choice_to_json(choice),
        "num_references": config.embed.num_references,
        "sparse_share": config.embed.sparse_share,
        # a list: texts of this header are hashes that later stages hold against each other
        "sides": ["liked"] if config.data.sides == "liked" else ["liked", "disliked"],
        "seed": config.seed,
    }
    index = read_index(shard_root(config.data.shards, loader=config.loader), kind="histories")
    shares = {split: part.share(-(-index.counts(split).users // USERS_PER_SHARD)) for split in index.splits}
    with EmbeddingWriter(
        out,
        header=header,
        users_per_shard=USERS_PER_SHARD,
        overwrite=True,
        part=None if part == WHOLE else part,
        first_shards={split: share.start for split, share in shares.items()},
    ) as writer:
        for split, share in shares.items():
            users = range(share.start * USERS_PER_SHARD, share.stop * USERS_PER_SHARD)
            for user in _embed_split(
                config, mllm=mllm, choice=choice, encoder=encoder, split=split, users=users
            ):
                writer.add(user, split=split)
        writer.close()
    return out


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    user: UserRows
    draws: tuple[Draw, ...]

    def references(self) -> list[References]:
        """Every draw, then every negative twin."""
        own = [self._rows(liked=draw.liked, disliked=draw.disliked) for draw in self.draws]
        return own + [one.swapped() for one in own]

    def _rows(self, *, liked: Sequence[int], disliked: Sequence[int]) -> References:
        return References(
            liked=self.user.rows("liked", positions=liked),
            disliked=self.user.rows("disliked", positions=disliked),
        )


def _embed_split(
    config: ProbeConfig,
    *,
    mllm: MLLM,
    choice: LayerChoice,
    encoder: ImageEncoder,
    split: Split,
    users: range,
) -> Iterator[UserEmbeddings]:
    features = load_split(config, mllm=mllm, split=split, device=mllm.device, users=users)
    # Training reads liked pictures only; the disliked ones' embeddings are half of this step's time.
    pictured: tuple[Side, ...] = ("liked",) if split == "train" else SIDES
    reader = ShardReader(shard_root(config.data.shards, loader=config.loader), split=split)
    embed, step = config.embed, config.embed.users_per_pass
    first_sparse = embed.num_draws - int(embed.num_draws * embed.sparse_share)
    total = len(features.users)
    with tqdm(total=total, desc=f"embedding users ({split})", unit="user", disable=total < 100) as bar:
        for start in range(0, total, step):
            group = [
                _Drawn(
                    user=user,
                    draws=tuple(
                        draw_of(
                            user.history,
                            draw=i,
                            num_references=embed.num_references,
                            seed=config.seed,
                            sparse=i >= first_sparse,
                            sides=config.data.sides,
                        )
                        for i in range(embed.num_draws)
                    ),
                )
                for user in features.users[start : start + step]
            ]
            references = [one for drawn in group for one in drawn.references()]
            states = embed_references(
                mllm, references=references, image_features=features.features, choice=choice, batch_size=64
            )
            core = states.core.cpu().float().numpy().reshape(len(group), 2, embed.num_draws, -1)
            sem = states.sem.cpu().float().numpy().reshape(len(group), 2, embed.num_draws, -1)
            for number, drawn in enumerate(group):
                sample = reader[users.start + start + number]
                assert sample is not None  # on_bad="raise"
                image = encoder.embed(user_images(sample, sides=pictured)).numpy()
                yield _user(drawn, core=core[number], sem=sem[number], image=image, pictured=pictured)
            bar.update(len(group))


def _user(
    drawn: _Drawn, *, core: np.ndarray, sem: np.ndarray, image: np.ndarray, pictured: Sequence[Side]
) -> UserEmbeddings:
    history = drawn.user.history
    whole = [(side, history.side(side)) for side in pictured]
    return UserEmbeddings(
        user_id=history.user_id,
        core=core[0],
        sem=sem[0],
        core_negative=core[1],
        sem_negative=sem[1],
        reference_keys=tuple(draw.keys(history.user_id) for draw in drawn.draws),
        image=image,
        image_keys=tuple(
            image_key(history.user_id, side, i) for side, images in whole for i in range(len(images))
        ),
        prompts=tuple(one.prompt for _, images in whole for one in images),
        liked_attributes=history.liked_attributes,
        disliked_attributes=history.disliked_attributes,
    )


def _most(size: int, *, wanted: int) -> int:
    return min(wanted, max(1, int(size * LARGEST_SHARE))) if size else 0
