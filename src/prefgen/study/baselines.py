"""Rivals that are drawn on request: the same base model, prompts and noise, another way to be told the taste.

Each sees at most what the profile was made from: its reference images, and for ``image_only``'s relatives
their image embeddings. What each may see stands in its meaning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefgen.errors import DataError
from prefgen.models.fusion import PartName
from prefgen.models.lora import load_lora
from prefgen.models.pixels import to_pil
from prefgen.models.representation import list_attributes
from prefgen.models.user_adapter import UserAdapter
from prefgen.schema import SIDES, Side, image_key
from prefgen.stages.features import model_hash, model_source
from prefgen.study.asking import MLLMForm
from prefgen.study.config import EvaluateExtraSection
from prefgen.study.drawing import DrawSettings, Studio, fitted_prompt
from prefgen.study.feedback import draw_with_feedback
from prefgen.study.inversion import draw_by_inversion
from prefgen.study.users import StudyUser

EXTRA_MEANINGS = {
    "words_mllm": "the base model with what the language model says this user likes in the prompt",
    "image_mean": "image only's adapter fed with the mean of all liked references",
    "image_minus": "the same with the mean of the disliked references taken off",
    "feedback": "the base model looking at the references in its self-attention; nothing is trained",
    "inversion": "words of their own learned for each user from the liked references (textual inversion)",
}
"""Condition -> what it is and may see."""

_CURVE_POINTS = 20


@dataclass(frozen=True, kw_only=True)
class Rivals:
    """What was drawn.

    Attributes:
        drawn: condition -> (U,P,3,H,W).
        facts: condition -> plain json: words, parameters, curve.
    """

    drawn: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def draw_rivals(
    studio: Studio,
    users: Sequence[StudyUser],
    *,
    extra: EvaluateExtraSection,
    image_only: UserAdapter | None,
    mllm: str,
    lora: Path,
    form: MLLMForm,
    settings: DrawSettings,
    seed: int,
    timed: Callable[[str], contextlib.AbstractContextManager[None]],
    progress: Callable[[int], object],
) -> Rivals:
    """Draw the conditions that were asked for, in the order of ``EXTRA_MEANINGS``.

    Args:
        studio: pipeline and projector.
        users: U users with P prompts each.
        extra: which, and how.
        image_only: the image-only adapter, for its relatives.
        mllm: folder or hub id, for ``words_mllm``.
        lora: its LoRA.
        form: in which form the MLLM is held.
        settings: the same as for the other conditions.
        seed: of the draws of inversion.
        timed: opens a part of timing.json.
        progress: called with the number of pictures (and, for inversion, user steps) just done.

    Raises:
        DataError: a user without any liked reference where one is needed.
    """
    rivals = Rivals()
    for name in (name for name in EXTRA_MEANINGS if name in extra.conditions):
        with timed(name):
            if name == "words_mllm":
                drawn, facts = _words(
                    studio, users, mllm=mllm, lora=lora, form=form, settings=settings, progress=progress
                )
            elif name == "feedback":
                drawn = draw_with_feedback(
                    studio,
                    users,
                    settings=settings,
                    count=extra.feedback_references,
                    weight=extra.feedback_weight,
                    until=extra.feedback_until,
                    progress=progress,
                )
                facts = {"parameters_per_user": 0}
            elif name == "inversion":
                drawn, facts = _inversion(
                    studio, users, extra=extra, settings=settings, seed=seed, progress=progress
                )
            else:
                assert image_only is not None  # the configuration was checked
                weight = extra.dislike_weight if name == "image_minus" else 0.0
                drawn = _from_means(
                    studio, users, adapter=image_only, dislike_weight=weight, settings=settings,
                    progress=progress,
                )  # fmt: skip
                facts = {"parameters_per_user": int(studio.bundle.image_width)}
        rivals.drawn[name], rivals.facts[name] = drawn, facts
    return rivals


def _flat(users: Sequence[StudyUser]) -> tuple[list[str], list[int]]:
    prompts = [prompt for user in users for prompt in user.prompts]
    return prompts, [seed for user in users for seed in user.seeds]


def _by_user(pixels: Tensor, *, users: Sequence[StudyUser]) -> Tensor:
    return pixels.reshape(len(users), -1, *pixels.shape[1:])


def mean_embedding(user: StudyUser, *, side: Side) -> Tensor | None:
    """(Dimage,) mean embedding of a side's references; None where there are none."""
    keys = [image_key(user.user_id, side, i) for i in user.shown(side)]
    rows = [user.embeddings.image_keys.index(key) for key in keys if key in user.embeddings.image_keys]
    if not rows:
        return None
    return torch.from_numpy(user.embeddings.image[rows].mean(axis=0))


def liked_minus_disliked(user: StudyUser, *, dislike_weight: float) -> Tensor:
    """(Dimage,) mean liked minus ``dislike_weight`` times mean disliked, at the mean liked one's length.

    The adapter was trained on embeddings of that length (our choice; a weight of 0 is the plain mean).

    Raises:
        DataError: no liked reference.
    """
    liked, disliked = (mean_embedding(user, side=side) for side in SIDES)
    if liked is None:
        raise DataError(f"user {user.user_id} has no liked reference; leave image_mean and image_minus out")
    if disliked is None or not dislike_weight:
        return liked
    difference = liked - dislike_weight * disliked
    scaled: Tensor = difference * (liked.norm() / difference.norm().clamp_min(1e-12))
    return scaled


def _from_means(
    studio: Studio,
    users: Sequence[StudyUser],
    *,
    adapter: UserAdapter,
    dislike_weight: float,
    settings: DrawSettings,
    progress: Callable[[int], object],
) -> Tensor:
    prompts, seeds = _flat(users)
    rows = torch.stack([liked_minus_disliked(user, dislike_weight=dislike_weight) for user in users])
    parts: Mapping[PartName, Tensor] = {"image": rows.repeat_interleave(len(users[0].prompts), dim=0)}
    pixels = studio.draw(
        prompts, seeds=seeds, settings=settings, adapter=adapter, parts=parts, progress=progress
    )
    return _by_user(pixels, users=users)


def _words(
    studio: Studio,
    users: Sequence[StudyUser],
    *,
    mllm: str,
    lora: Path,
    form: MLLMForm,
    settings: DrawSettings,
    progress: Callable[[int], object],
) -> tuple[Tensor, dict[str, Any]]:
    """Prompts with the MLLM's list of each user's references behind them."""
    model = form.load(model_source(mllm))
    load_lora(model, path=lora, mllm_hash=model_hash(mllm))
    told = [
        list_attributes(
            model,
            liked=to_pil(user.liked[user.shown("liked")]),
            disliked=to_pil(user.disliked[user.shown("disliked")]),
            kind="likes",
        )
        for user in users
    ]
    texts = [
        fitted_prompt(prompt, words=words, bundle=studio.bundle)
        for user, words in zip(users, told, strict=True)
        for prompt in user.prompts
    ]
    pixels = studio.draw(texts, seeds=_flat(users)[1], settings=settings, progress=progress)
    right = [
        float(np.mean([word in user.history.liked_attributes for word in words])) if words else 0.0
        for user, words in zip(users, told, strict=True)
    ]
    facts: dict[str, Any] = {
        "parameters_per_user": 0,
        "words_per_user": float(np.mean([len(words) for words in told])),
    }
    if all(user.history.liked_attributes for user in users):
        facts["share_of_words_truly_liked"] = float(np.mean(right))
    return _by_user(pixels, users=users), facts


def _inversion(
    studio: Studio,
    users: Sequence[StudyUser],
    *,
    extra: EvaluateExtraSection,
    settings: DrawSettings,
    seed: int,
    progress: Callable[[int], object],
) -> tuple[Tensor, dict[str, Any]]:
    drawn, learned = draw_by_inversion(
        studio,
        users,
        settings=settings,
        num_vectors=extra.inversion_vectors,
        num_steps=extra.inversion_steps,
        learning_rate=extra.inversion_learning_rate,
        seed=seed,
        progress=progress,
    )
    chunks = np.array_split(np.array(learned.curve), min(_CURVE_POINTS, len(learned.curve)))
    facts = {
        "parameters_per_user": int(learned.vectors[0].numel()),
        "steps_per_user": extra.inversion_steps,
        "learning_rate": extra.inversion_learning_rate,
        "curve": [float(chunk.mean()) for chunk in chunks],
    }
    return drawn, facts
