"""The unseen users of an evaluation: what each has shown, what is drawn for each, and from which noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prefgen.data.embeddings import EmbeddingReader, UserEmbeddings
from prefgen.data.reader import ShardReader, UserSample, decode_image
from prefgen.data.sampling import rng_for
from prefgen.errors import DataError
from prefgen.models.pixels import to_pixels
from prefgen.schema import Side, UserHistory, image_key


@dataclass(frozen=True, kw_only=True)
class StudyUser:
    """One unseen user.

    Attributes:
        history: what the user has judged.
        embeddings: what stage probe wrote.
        draws: reference draws whose mean is the profile.
        references: image keys of those draws.
        anchor: row of ``embeddings.image``: e_img, the ONE liked image, outside the references if possible.
        anchor_position: the same image among the liked ones.
        real: positions of liked drawings, one a prompt, neither references nor anchor if possible.
        prompts: what is drawn; subjects of test histories, never the anchor's.
        seeds: noise of each prompt, the same under every condition.
        liked: pixels (L,3,H,W) in [-1,1].
        disliked: pixels (K,3,H,W).
    """

    history: UserHistory
    embeddings: UserEmbeddings
    draws: tuple[int, ...]
    references: frozenset[str]
    anchor: int
    anchor_position: int
    real: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    liked: Tensor
    disliked: Tensor

    @property
    def user_id(self) -> str:
        """The user."""
        return self.history.user_id

    @property
    def images(self) -> Tensor:
        """(N,3,H,W): everything the user has shown."""
        return torch.cat([self.liked, self.disliked])

    def shown(self, side: Side) -> list[int]:
        """Positions of the references of one side, in order."""
        count = len(self.history.side(side))
        return [i for i in range(count) if image_key(self.user_id, side, i) in self.references]

    def held_back(self, side: Side, *, count: int) -> list[int]:
        """Positions of at most ``count`` images of one side, to show to a judge who is to know this user.

        First those that no picture was drawn from and none is shown as ``real``: a copy of a reference must
        not please for being recognised. References and the anchor fill up what a short history lacks. Ours.
        """
        shown = self.shown(side)
        if side == "liked":
            shown += [self.anchor_position] if self.anchor_position not in shown else []
        real = set(self.real) if side == "liked" else set()
        fresh = [i for i in range(len(self.history.side(side))) if i not in shown and i not in real]
        return [*fresh, *(i for i in shown if i not in real)][:count] or shown[:count]


def prompt_pool(shards: Path, *, known: Sequence[str]) -> tuple[str, ...]:
    """Subjects of the test users' histories that the judge can name, sorted.

    Raises:
        DataError: there are none: the judge belongs to other data.
    """
    reader = ShardReader(shards, split="test")
    found: set[str] = set()
    for position in range(len(reader)):
        history = reader.read(position).history
        found |= {image.prompt for image in (*history.liked, *history.disliked)}
    pool = tuple(sorted(found & set(known)))
    if not pool:
        raise DataError(
            f"the judge can name none of the {len(found)} prompts of the test users in {shards}; pass "
            "model.judge=FILE with a judge of this data"
        )
    return pool


def load_users(
    shards: Path,
    *,
    embeddings: Path,
    pool: Sequence[str],
    num_users: int,
    num_prompts: int,
    num_draws: int,
    image_size: tuple[int, int],
    seed: int,
) -> list[StudyUser]:
    """The first test users that have a liked image, with everything that is drawn for them.

    Raises:
        DataError: fewer than two such users, or embeddings of other users than the shards'.
    """
    reader, numbers = ShardReader(shards, split="test"), EmbeddingReader(embeddings, split="test")
    row_of = {user_id: row for row, user_id in enumerate(numbers.user_ids)}
    users: list[StudyUser] = []
    for position in range(len(reader)):
        if len(users) == num_users:
            break
        sample = reader.read(position)
        if not sample.liked:
            continue
        if sample.user_id not in row_of:
            raise DataError(
                f"user {sample.user_id} of {shards} is not in {embeddings}; run 'prefgen predict --stage "
                "probe' again on these shards"
            )
        own = numbers.read(row_of[sample.user_id])
        users.append(
            _user(
                sample,
                embeddings=own,
                pool=pool,
                num_prompts=num_prompts,
                num_draws=num_draws,
                image_size=image_size,
                seed=seed,
            )
        )
    if len(users) < 2:
        raise DataError(f"{shards} has {len(users)} test users with a liked image; at least 2 are needed")
    return users


def _user(
    sample: UserSample,
    *,
    embeddings: UserEmbeddings,
    pool: Sequence[str],
    num_prompts: int,
    num_draws: int,
    image_size: tuple[int, int],
    seed: int,
) -> StudyUser:
    draws = tuple(range(min(num_draws, len(embeddings.reference_keys))))
    references = frozenset(key for draw in draws for key in embeddings.reference_keys[draw])
    keys = sample.keys("liked")
    rng = rng_for(seed=seed, epoch=0, key=sample.user_id, purpose="evaluate pictures")
    order = [int(i) for i in rng.permutation(len(keys))]
    # Pictures outside the references come first; a short history falls back on the references.
    order.sort(key=lambda i: keys[i] in references)
    anchor, rest = order[0], order[1:] or order
    own = sample.history.liked[anchor].prompt
    subjects = [prompt for prompt in pool if prompt != own] or list(pool)
    rng = rng_for(seed=seed, epoch=0, key=sample.user_id, purpose="evaluate prompts")
    chosen = rng.choice(len(subjects), num_prompts, replace=num_prompts > len(subjects))
    if keys[anchor] not in embeddings.image_keys:
        raise DataError(
            f"user {sample.user_id}: the embeddings know no image {keys[anchor]}; run 'prefgen predict "
            "--stage probe' again on these shards"
        )
    return StudyUser(
        history=sample.history,
        embeddings=embeddings,
        draws=draws,
        references=references,
        anchor=embeddings.image_keys.index(keys[anchor]),
        anchor_position=anchor,
        real=tuple(rest[i % len(rest)] for i in range(num_prompts)),
        prompts=tuple(subjects[int(i)] for i in chosen),
        seeds=tuple(
            int(rng_for(seed=seed, epoch=i, key=sample.user_id, purpose="evaluate noise").integers(1 << 31))
            for i in range(num_prompts)
        ),
        liked=_pixels(sample, side="liked", size=image_size),
        disliked=_pixels(sample, side="disliked", size=image_size),
    )


def _pixels(sample: UserSample, *, side: Side, size: tuple[int, int]) -> Tensor:
    images = [
        decode_image(data, where=sample.image_where(side, position=position))
        for position, data in enumerate(sample.side(side))
    ]
    return to_pixels(images, size=size) if images else torch.empty(0, 3, *size)
