"""From measured conditions and profiles to the numbers of ``dial.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from prefgen.dials.measure import Measured, Measurements, Table
from prefgen.dials.plan import DialPlan, Point, ProfileSet
from prefgen.dials.profiles import ProfileShelf
from prefgen.evaluate.alignment import bootstrap, derangement
from prefgen.evaluate.comparing import compare, corrected
from prefgen.evaluate.preference import share_of, win_rate
from prefgen.profile import UserProfile
from prefgen.profile_math import cosine_distances
from prefgen.study.users import StudyUser

RIVALS = {"base": "own against base", "other": "own against other", "image_only": "own against image only"}
"""What the own pictures are compared with, and its words."""


def dial_figures(
    plan: DialPlan,
    *,
    measurements: Measurements,
    shelf: ProfileShelf,
    users: Sequence[StudyUser],
    image_only: bool,
    seed: int,
    num_resamples: int,
) -> dict[str, Any]:
    """``curves``, ``base``, ``image_only``, ``zero_is_base``, ``updates_minus_built`` and ``distances``."""
    count = _Counter(seed=seed, num_resamples=num_resamples)
    base = measurements.load(plan.base)
    single = measurements.load(plan.image_only) if image_only else None
    figures: dict[str, Any] = {
        "curves": {
            name: [
                count.point(point, measurements=measurements, base=base, single=single) for point in points
            ]
            for name, points in plan.curves().items()
        },
        "base": count.alone(base),
    }
    if single is not None:
        figures["image_only"] = {
            **count.alone(single),
            "against_base": count.wins(single.utility, base.utility),
        }
    if plan.user_scales[0] == 0:
        zero = plan.curves()["user_scale"][0]
        ends = [measurements.load(one).pixels for one in (zero.own, zero.other)]
        figures["zero_is_base"] = all(pixels == base.pixels for pixels in ends)
    figures["updates_minus_built"] = _updates(plan, measurements=measurements, count=count)
    figures["distances"] = _distances(plan, shelf=shelf, users=users, count=count, seed=seed)
    return figures


class _Counter:
    """The one way in which numbers get their intervals: bootstrap over users."""

    def __init__(self, *, seed: int, num_resamples: int) -> None:
        self.seed, self.num_resamples = seed, num_resamples

    def mean(self, values: Table) -> dict[str, Any]:
        """Of one value a user."""
        return asdict(bootstrap(values, seed=self.seed, draws=self.num_resamples))

    def wins(self, own: Table, against: Table) -> dict[str, Any]:
        """Share of pictures whose utility is the higher one, ties half."""
        return asdict(win_rate(own, against, seed=self.seed, num_resamples=self.num_resamples))

    def alone(self, measured: Measured) -> dict[str, Any]:
        """Utility and prompt fidelity."""
        return {
            "utility": self.mean(measured.utility.mean(axis=1)),
            "prompt_fidelity": self.mean(measured.fidelity),
        }

    def point(
        self, point: Point, *, measurements: Measurements, base: Measured, single: Measured | None
    ) -> dict[str, Any]:
        """Everything at one place of a curve."""
        own, other = measurements.load(point.own), measurements.load(point.other)
        against = {"base": base, "other": other} | ({} if single is None else {"image_only": single})
        kept = share_of(own.fidelity, base.fidelity, seed=self.seed, num_resamples=self.num_resamples)
        return {
            "x": point.x,
            "condition": point.own.name,
            **{f"own_vs_{name}": self.wins(own.utility, one.utility) for name, one in against.items()},
            **self.alone(own),
            "prompt_fidelity_kept": asdict(kept),
        }


def _updates(plan: DialPlan, *, measurements: Measurements, count: _Counter) -> list[dict[str, Any]]:
    """What updating costs: own utility and wins against profiles built from the same images at once."""
    curves = plan.curves()
    pairs = [
        (int(updated.x), measurements.load(updated.own), measurements.load(built.own))
        for updated, built in zip(curves["updates"], curves["images"], strict=True)
        if updated.own != built.own
    ]
    family = corrected(
        {
            str(n): compare(
                updated.utility.mean(axis=1),
                built.utility.mean(axis=1),
                seed=count.seed,
                num_resamples=count.num_resamples,
            )
            for n, updated, built in pairs
        }
    )
    return [
        {
            "images": n,
            "wins": count.wins(updated.utility, built.utility),
            "utility": asdict(family[str(n)]),
        }
        for n, updated, built in pairs
    ]


def _distances(
    plan: DialPlan, *, shelf: ProfileShelf, users: Sequence[StudyUser], count: _Counter, seed: int
) -> list[dict[str, Any]]:
    """Cosine distances of tensors, with what draws alone and what another user make beside them."""

    def row(words: str, images: int, first: list[UserProfile], second: list[UserProfile]) -> dict[str, Any]:
        found = [cosine_distances(one, other) for one, other in zip(first, second, strict=True)]
        tensors = {name: count.mean(np.array([each[name] for each in found])) for name in found[0]}
        return {"compared": words, "images": images, "tensors": tensors}

    def built(images: int) -> list[UserProfile]:
        return shelf.load(ProfileSet(making="built", images=images), users=users)

    rows = [
        row("updated", n, shelf.load(ProfileSet(making="updated", images=n), users=users), built(n))
        for n in plan.images[1:]
    ]
    most = plan.images[-1]
    whole = built(most)
    again = shelf.load(ProfileSet(making="reseeded", images=most), users=users)
    others = [whole[i] for i in derangement(len(whole), seed=seed)]
    return [*rows, row("other draws", most, again, whole), row("another user", most, others, whole)]
