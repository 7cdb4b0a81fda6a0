"""Pictures in, figures out: utilities, win rates, prompt fidelity, copying; and the judge's own figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefgen.evaluate.alignment import bootstrap
from prefgen.evaluate.copying import Distance, nearest_distances, nearest_to_each_other
from prefgen.evaluate.judges import Judge, Judgement, utility
from prefgen.evaluate.judging import judged_attributes, read_attributes, subject_accuracy
from prefgen.evaluate.preference import PromptFidelity, share_of, win_rate
from prefgen.study.drawing import Studio
from prefgen.study.users import StudyUser

PAIRS = (
    ("own", "base"),
    ("own", "other"),
    ("own", "image_only"),
    ("own", "words"),
    ("own", "real"),
    ("other", "base"),
    ("image_only", "base"),
    ("words", "base"),
)
"""Which condition is compared with which; the last three say what the first ones are worth."""

Table = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Seed and number of bootstrap draws behind every interval."""

    seed: int
    num_resamples: int

    def of(self, per_user: Table) -> dict[str, Any]:
        """Mean, low, high and number of users, as plain json."""
        return asdict(bootstrap(per_user, seed=self.seed, draws=self.num_resamples))


def measure_judge(
    judge: Judge,
    *,
    users: Sequence[StudyUser],
    studio: Studio,
    pool: Sequence[str],
    minimum: float,
    max_images: int,
    seed: int,
    batch_size: int,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """What the judge reads right on drawings of the test users, clean and after the VAE's round trip.

    Returns:
        ``attributes`` (word -> clean, restored, count), ``subject``, ``judged``, ``left_out`` and
        ``never_shown`` words, ``num_images``.
    """
    pixels = torch.cat([user.images for user in users])
    shown = [image for user in users for image in (*user.history.liked, *user.history.disliked)]
    rows = np.random.default_rng(seed).permutation(len(shown))[:max_images]
    chosen = sorted(int(row) for row in rows)
    pixels, shown = pixels[chosen], [shown[row] for row in chosen]
    restored = studio.restored(pixels, batch_size=batch_size, progress=progress)
    known = [i for i, image in enumerate(shown) if image.prompt in pool]
    readings, subjects = {}, {}
    for name, pictures in (("clean", pixels), ("restored", restored)):
        judgement = judge.judge(pictures)
        readings[name] = read_attributes(
            judgement, groups=judge.groups, shown=[image.attributes for image in shown]
        )
        subjects[name] = subject_accuracy(
            judgement.subjects[known],
            subjects=judge.subjects,
            prompts=[shown[i].prompt for i in known],
            among=pool,
        )
    judged = judged_attributes(readings["restored"], minimum=minimum)
    words = [word for group in judge.groups.values() for word in group]
    return {
        "num_images": len(shown),
        "minimum": minimum,
        "attributes": {
            word: {
                "clean": readings["clean"][word].accuracy,
                "restored": readings["restored"][word].accuracy,
                "count": readings["restored"][word].count,
            }
            for word in words
        },
        "subject": {**subjects, "num_subjects": len(pool)},
        "judged": [word for word in words if word in judged],
        "left_out": [word for word in words if word not in judged and readings["clean"][word].count],
        "never_shown": [word for word in words if not readings["clean"][word].count],
    }


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The judge's word on every picture.

    Attributes:
        utilities: condition -> (U,P) liked minus disliked probability over the judged attributes.
        fidelity: condition -> (U,) share of pictures whose prompt's subject the judge names.
        judgements: condition -> the judge's probabilities for the U x P pictures.
    """

    utilities: dict[str, Table]
    fidelity: dict[str, Table]
    judgements: dict[str, Judgement]


def judge_pictures(
    judge: Judge,
    *,
    users: Sequence[StudyUser],
    drawn: Mapping[str, Tensor],
    pool: Sequence[str],
    judged: Sequence[str],
) -> Judged:
    """Judge all conditions (U,P,3,H,W); real drawings are held to their own subject, not to the prompt."""
    num_prompts = len(users[0].prompts)
    liked = [user.history.liked_attributes for user in users for _ in user.prompts]
    disliked = [user.history.disliked_attributes for user in users for _ in user.prompts]
    numbers = torch.arange(len(users)).repeat_interleave(num_prompts)
    utilities, fidelity, judgements = {}, {}, {}
    for name, pictures in drawn.items():
        judgement = judgements[name] = judge.judge(pictures.flatten(0, 1))
        values = utility(
            judgement, groups=judge.groups, liked=liked, disliked=disliked, judged=frozenset(judged)
        )
        utilities[name] = values.double().numpy().reshape(len(users), num_prompts)
        prompts = [prompt for user in users for prompt in user.prompts]
        if name == "real":
            prompts = [user.history.liked[i].prompt for user in users for i in user.real]
        metric = PromptFidelity(subjects=judge.subjects, among=pool)
        metric.update(judgement.subjects, prompts=prompts, users=numbers)
        fidelity[name] = metric.per_user()
    return Judged(utilities=utilities, fidelity=fidelity, judgements=judgements)


def preference_figures(
    judged: Judged, *, intervals: Intervals, more_pairs: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """``own_vs_base`` and the other pairs, ``utility`` and ``prompt_fidelity`` of each condition."""
    figures: dict[str, Any] = {}
    for first, second in (*PAIRS, *more_pairs):
        if first in judged.utilities and second in judged.utilities:
            found = win_rate(
                judged.utilities[first],
                judged.utilities[second],
                seed=intervals.seed,
                num_resamples=intervals.num_resamples,
            )
            figures[f"{first}_vs_{second}"] = asdict(found)
    figures["utility"] = {
        name: intervals.of(values.mean(axis=1)) for name, values in judged.utilities.items()
    }
    figures["prompt_fidelity"] = {name: intervals.of(values) for name, values in judged.fidelity.items()}
    kept = share_of(
        judged.fidelity["own"],
        judged.fidelity["base"],
        seed=intervals.seed,
        num_resamples=intervals.num_resamples,
    )
    figures["prompt_fidelity_kept"] = asdict(kept)
    return figures


def copying_figures(
    drawn: Mapping[str, Tensor], *, users: Sequence[StudyUser], studio: Studio, intervals: Intervals
) -> dict[str, Any]:
    """Distance of each condition's pictures to the nearest image of their user's history.

    ``history`` is how near a user's images are to each other: a condition far below it copies.
    """
    embeds = [torch.from_numpy(user.embeddings.image) for user in users]
    figures: dict[str, Any] = {}
    kinds: tuple[Distance, ...] = ("pixels", "embedding")
    for kind in kinds:
        histories = [user.images for user in users] if kind == "pixels" else embeds
        rows = {}
        for name, pictures in drawn.items():
            if name == "real":
                continue  # they are part of the history
            flat = pictures.flatten(0, 1)
            values = nearest_distances(
                flat if kind == "pixels" else studio.bundle.embed_images(flat),
                histories=[history for history in histories for _ in range(pictures.shape[1])],
                distance=kind,
            )
            rows[name] = intervals.of(values.numpy().reshape(len(users), -1).mean(axis=1))
        many = [history for history in histories if len(history) > 1]
        if many:
            means = [float(nearest_to_each_other(history, distance=kind).mean()) for history in many]
            rows["history"] = intervals.of(np.array(means))
        figures[kind] = rows
    return figures


def worst_users(judged: Judged, *, count: int) -> list[int]:
    """Numbers of the users whose own pictures gained least over the base model's, worst first."""
    margins = (judged.utilities["own"] - judged.utilities["base"]).mean(axis=1)
    return [int(i) for i in np.argsort(margins, kind="stable")[:count]]
