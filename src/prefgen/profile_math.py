"""Arithmetic of profiles: a first one from what the models read, one brought up to date, several as one.

What the image encoder gives is a mean over images, and a running mean is exact: however images arrive, the
means are those of all. What the MLLM gives is not: core and sem are read from prompts that show several
images AT ONCE, and those are not kept. An update therefore reads the new images by themselves and weighs that
reading against the stored mean by the number of images on both sides: near what a build from all would give,
not the same. :func:`cosine_distances` says how near.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefgen.errors import CheckpointError, ConfigError
from prefgen.profile import TENSORS, ProfileCounts, UserProfile

_READ = ("core_embeds", "sem_embeds", "core_negative", "sem_negative")
_TWINS = {
    "core_embeds": "core_negative",
    "sem_embeds": "sem_negative",
    "image_embeds": "image_negative",
    "image_mean": "image_mean_negative",
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the models read from some images of one user. Tensors are float32, on the CPU.

    Attributes:
        core_embeds: (Dcore,) mean over draws of references.
        sem_embeds: (Dsem,) likewise.
        core_negative: (Dcore,) of the same draws with their sides swapped.
        sem_negative: (Dsem,) likewise.
        liked: (N,Dimage) embedding of every liked image; N may be 0.
        disliked: (M,Dimage) likewise.
        draws: how many draws.
    """

    core_embeds: Tensor
    sem_embeds: Tensor
    core_negative: Tensor
    sem_negative: Tensor
    liked: Tensor
    disliked: Tensor
    draws: int


def first_profile(reading: Reading, *, lineage: Mapping[str, str], user_id: str | None) -> UserProfile:
    """The profile of a user of whom these images are all that is known."""
    image, image_mean = _anchor(reading.liked)
    negative, negative_mean = _anchor(reading.disliked)
    return UserProfile(
        **{name: getattr(reading, name) for name in _READ},
        image_embeds=image,
        image_negative=negative,
        image_mean=image_mean,
        image_mean_negative=negative_mean,
        counts=ProfileCounts(liked=len(reading.liked), disliked=len(reading.disliked), draws=reading.draws),
        lineage=lineage,
        user_id=user_id,
    )


def updated_profile(profile: UserProfile, *, reading: Reading) -> UserProfile:
    """A profile after more images, without its words, which spoke of the earlier ones alone.

    The anchors ``image_embeds`` and ``image_negative`` stay real images: of the stored one and the new ones
    the nearest to the new mean.
    """
    before = profile.counts
    old, new = before.liked + before.disliked, len(reading.liked) + len(reading.disliked)
    read: dict[str, Any] = {
        name: _mean([getattr(profile, name), getattr(reading, name)], weights=[old, new]) for name in _READ
    }
    image, image_mean = _moved(
        profile.image_embeds, mean=profile.image_mean, count=before.liked, new=reading.liked
    )
    negative, negative_mean = _moved(
        profile.image_negative,
        mean=profile.image_mean_negative,
        count=before.disliked,
        new=reading.disliked,
    )
    return replace(
        profile,
        **read,
        image_embeds=image,
        image_mean=image_mean,
        image_negative=negative,
        image_mean_negative=negative_mean,
        counts=replace(
            before,
            liked=before.liked + len(reading.liked),
            disliked=before.disliked + len(reading.disliked),
            draws=before.draws + reading.draws,
            updates=before.updates + 1,
        ),
        likes=None,
        dislikes=None,
    )


def combined_profile(
    profiles: Sequence[UserProfile], *, weights: Sequence[float], names: Sequence[str]
) -> UserProfile:
    """Several tastes as one: their weighted mean. Words are not kept; a user_id where all have the same.

    A negative weight takes that profile with its sides swapped, at the weight's size: what it likes counts
    as disliked. It does not subtract. Hidden states of a language model share a mean far larger than what
    tells users apart; 1 * a - 0.3 * b would carry 0.7 of that mean, or, divided by 0.7, blow up every
    difference and the noise with it, without bound as the weights near a sum of 0. The adapter standardises
    by statistics of real histories, and a mean of histories, swapped ones among them, stays among those.

    Args:
        profiles: at least one.
        weights: one each, finite, one of them above 0; their sizes are divided by their sum.
        names: of the profiles, for messages.

    Raises:
        ConfigError: the weights say nothing.
        CheckpointError: profiles of different models.
    """
    _check_weights(weights, count=len(profiles))
    for profile, name in zip(profiles, names, strict=True):
        _check_alike(profiles[0], other=profile, names=(names[0], name))
    sides = [
        (profile if weight > 0 else swapped(profile), abs(weight))
        for profile, weight in zip(profiles, weights, strict=True)
        if weight
    ]
    sizes = [weight for _, weight in sides]
    read: dict[str, Any] = {
        name: _mean([getattr(one, name) for one, _ in sides], weights=sizes) for name in _READ
    }
    image, image_mean = _combined_image(sides)
    negative, negative_mean = _combined_image([(swapped(one), weight) for one, weight in sides])
    counts = [one.counts for one, _ in sides]
    owners = {profile.user_id for profile in profiles}
    return UserProfile(
        **read,
        image_embeds=image,
        image_mean=image_mean,
        image_negative=negative,
        image_mean_negative=negative_mean,
        counts=ProfileCounts(
            liked=sum(one.liked for one in counts),
            disliked=sum(one.disliked for one in counts),
            draws=sum(one.draws for one in counts),
            updates=sum(one.updates for one in counts),
            combined=sum(max(1, one.combined) for one in counts),
        ),
        lineage=profiles[0].lineage,
        user_id=profiles[0].user_id if len(owners) == 1 else None,
    )


def swapped(profile: UserProfile) -> UserProfile:
    """The negative twin as a profile: what was disliked is liked."""
    tensors = {name: getattr(profile, twin) for name, twin in _TWINS.items()}
    twins = {twin: getattr(profile, name) for name, twin in _TWINS.items()}
    counts = replace(profile.counts, liked=profile.counts.disliked, disliked=profile.counts.liked)
    return replace(profile, **tensors, **twins, counts=counts, likes=profile.dislikes, dislikes=profile.likes)


def cosine_distances(first: UserProfile, second: UserProfile) -> dict[str, float]:
    """Tensor -> 1 - cosine, in [0,2]; 0 where both are zero, 1 where one is."""
    found = {}
    for name in TENSORS:
        one, other = getattr(first, name).double(), getattr(second, name).double()
        if torch.equal(one, other):
            found[name] = 0.0
        else:
            found[name] = float(1 - torch.cosine_similarity(one, other, dim=0))
    return found


def _check_weights(weights: Sequence[float], *, count: int) -> None:
    if len(weights) != count:
        raise ConfigError(f"{len(weights)} weights for {count} profiles; give one for each")
    if not all(torch.isfinite(torch.tensor(weight, dtype=torch.float64)) for weight in weights):
        raise ConfigError(f"weights must be finite numbers, got {_listed(weights)}")
    if max(weights) <= 0:
        raise ConfigError(f"at least one weight must be above 0, got {_listed(weights)}")


def _listed(weights: Sequence[float]) -> str:
    return ",".join(f"{weight:g}" for weight in weights)


def _check_alike(first: UserProfile, *, other: UserProfile, names: tuple[str, str]) -> None:
    mend = "build both with the same models"
    try:
        other.require_lineage(first.lineage, what=names[0], mend=mend)
    except CheckpointError as error:
        raise CheckpointError(f"{names[1]}: {error}") from None
    for name in TENSORS:
        widths = len(getattr(first, name)), len(getattr(other, name))
        if widths[0] != widths[1]:
            raise CheckpointError(
                f"{names[1]}: {name} has {widths[1]} numbers, that of {names[0]} has {widths[0]}; {mend}"
            )


def _combined_image(sides: Sequence[tuple[UserProfile, float]]) -> tuple[Tensor, Tensor]:
    """(anchor, mean) of the liked side; zeros where no profile has seen an image of it."""
    seen = [(one, weight) for one, weight in sides if one.counts.liked]
    if not seen:
        empty = torch.zeros_like(sides[0][0].image_embeds)
        return empty, empty.clone()
    mean = _mean([one.image_mean for one, _ in seen], weights=[weight for _, weight in seen])
    return _nearest(torch.stack([one.image_embeds for one, _ in seen]), mean=mean), mean


def _moved(anchor: Tensor, *, mean: Tensor, count: int, new: Tensor) -> tuple[Tensor, Tensor]:
    """(anchor, mean) of one side after new images (N,Dimage)."""
    if not len(new):
        return anchor, mean
    if not count:
        return _anchor(new)
    moved = _mean([mean, new.double().mean(dim=0)], weights=[count, len(new)])
    return _nearest(torch.cat([anchor[None], new]), mean=moved), moved


def _anchor(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """The embedding nearest to the mean of all (N,D), and that mean; zeros where there is none.

    One real image, not the mean: stage inject trained on embeddings of single images, and a mean of several
    lies where none of them is.
    """
    if not len(embeds):
        empty = embeds.new_zeros(embeds.shape[1])
        return empty, empty.clone()
    mean = embeds.mean(dim=0)
    return _nearest(embeds, mean=mean), mean


def _nearest(embeds: Tensor, *, mean: Tensor) -> Tensor:
    return embeds[int((embeds - mean).norm(dim=1).argmin())].clone()


def _mean(tensors: Sequence[Tensor], *, weights: Sequence[float]) -> Tensor:
    """Weighted mean, summed in float64: a thousand updates must not wear a float32 mean away."""
    total = float(sum(weights))
    terms = [tensor.double() * (weight / total) for tensor, weight in zip(tensors, weights, strict=True)]
    return torch.stack(terms).sum(dim=0).float()
