"""Which profiles are made and which pictures are drawn from them. No torch here.

Every curve is a list of points, every point a few conditions, and a condition that two points share (the full
strength is also the profile of eight images) is drawn once. All choices here are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prefgen.errors import ConfigError

Who = Literal["nobody", "own", "other", "image_only"]
Making = Literal["built", "liked", "updated", "reseeded"]
"""How a profile is made: from n liked and n disliked images; from n liked ones alone; from one of either side
and then an update for every further image; built once more with another seed, to see what draws alone do."""

CURVES = {
    "user_scale": "user_scale",
    "negative_user_scale": "negative_user_scale",
    "images": "liked and disliked images",
    "liked": "liked images alone",
    "updates": "images, added one at a time",
}
"""Curve -> what stands below its axis."""


@dataclass(frozen=True, kw_only=True)
class ProfileSet:
    """One profile a user, all made alike.

    Attributes:
        making: how.
        images: images of a side; a user who has fewer gives all.
    """

    making: Making
    images: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.making}-{self.images:02d}"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Pictures of all users' prompts under one setting.

    Attributes:
        who: whose profile: ``nobody`` is the base model, ``other`` the profile of another user, drawn by lot,
            ``image_only`` the own one's liked image through the separate adapter.
        profiles: which; None for nobody.
        user_scale: strength of the liked side.
        negative_scale: strength of the disliked side in the unconditional branch.
    """

    who: Who
    profiles: ProfileSet | None = None
    user_scale: float = 1.0
    negative_scale: float = 0.0

    @property
    def name(self) -> str:
        """Of its file."""
        if self.profiles is None:
            return self.who
        return f"{self.who}-{self.profiles.name}-u{self.user_scale:g}-n{self.negative_scale:g}"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place on a curve: own pictures, and those of another's profile under the same setting."""

    x: float
    own: Condition
    other: Condition


@dataclass(frozen=True, kw_only=True)
class DialPlan:
    """What is measured.

    Attributes:
        user_scales: points of the first curve.
        negative_scales: points of the second.
        images: points of the others, ascending, at least two.
        reference: images of a side behind the first two curves.
        strength: ``user_scale`` of all curves but the first.
    """

    user_scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
    negative_scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
    images: tuple[int, ...] = (1, 2, 4, 8, 16)
    reference: int = 8
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Check the points.

        Raises:
            ConfigError: none, unordered or impossible ones.
        """
        for name in ("user_scales", "negative_scales", "images"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)) or values[0] < (name == "images"):
                low = "1" if name == "images" else "0"
                raise ConfigError(
                    f"--{name.replace('_', '-')}: expected ascending numbers from {low}, got {values}"
                )
        if len(self.images) < 2:
            raise ConfigError(f"--images: an update needs two numbers at least, got {self.images}")
        if self.reference < 1:
            raise ConfigError(f"--reference must be 1 or more, got {self.reference}")

    @property
    def shared(self) -> ProfileSet:
        """The profiles behind both scales, and behind the image-only adapter."""
        return ProfileSet(making="built", images=self.reference)

    @property
    def base(self) -> Condition:
        """The base model."""
        return Condition(who="nobody")

    @property
    def image_only(self) -> Condition:
        """The separate adapter on one liked image; its strength is not turned."""
        return Condition(who="image_only", profiles=self.shared)

    def profile_sets(self) -> tuple[ProfileSet, ...]:
        """All profiles to make; the updates of a user come from one walk over the images."""
        sets = [self.shared]
        sets += [ProfileSet(making="built", images=n) for n in self.images if n != self.reference]
        sets += [ProfileSet(making="liked", images=n) for n in self.images]
        sets += [ProfileSet(making="updated", images=n) for n in self.images[1:]]
        return (*sets, ProfileSet(making="reseeded", images=self.images[-1]))

    def curves(self) -> dict[str, tuple[Point, ...]]:
        """Curve -> its points."""

        def built(n: int) -> ProfileSet:
            return ProfileSet(making="built", images=n)

        def updated(n: int) -> Point:
            made = ProfileSet(making="updated", images=n) if n > self.images[0] else built(n)
            return Point(x=n, own=self._with("own", made), other=self._with("other", built(n)))

        return {
            "user_scale": tuple(self._point(s, self.shared, user_scale=s) for s in self.user_scales),
            "negative_user_scale": tuple(
                self._point(s, self.shared, negative_scale=s) for s in self.negative_scales
            ),
            "images": tuple(self._point(n, built(n)) for n in self.images),
            "liked": tuple(self._point(n, ProfileSet(making="liked", images=n)) for n in self.images),
            "updates": tuple(updated(n) for n in self.images),
        }

    def conditions(self) -> tuple[Condition, ...]:
        """Everything to draw, each once; the base model first."""
        return tuple(dict.fromkeys(self._all_conditions()))

    def _all_conditions(self) -> Iterator[Condition]:
        yield self.base
        yield self.image_only
        for points in self.curves().values():
            for point in points:
                yield from (point.own, point.other)

    def _with(
        self, who: Who, profiles: ProfileSet, *, user_scale: float | None = None, negative_scale: float = 0.0
    ) -> Condition:
        strength = self.strength if user_scale is None else user_scale
        return Condition(who=who, profiles=profiles, user_scale=strength, negative_scale=negative_scale)

    def _point(
        self,
        x: float,
        profiles: ProfileSet,
        *,
        user_scale: float | None = None,
        negative_scale: float = 0.0,
    ) -> Point:
        own, other = (
            self._with(who, profiles, user_scale=user_scale, negative_scale=negative_scale) for who in _SIDES
        )
        return Point(x=x, own=own, other=other)


_SIDES: Sequence[Who] = ("own", "other")
