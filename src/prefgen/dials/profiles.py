"""Profiles of the test users, made in every way that is compared; one file each, so that work goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from prefgen.data.sampling import rng_for
from prefgen.dials.plan import DialPlan, ProfileSet
from prefgen.errors import CheckpointError
from prefgen.models.pixels import to_pil
from prefgen.profile import UserProfile
from prefgen.profile_batch import safe_name
from prefgen.schema import SIDES
from prefgen.study.users import StudyUser
from prefgen.taste import TasteModels

_OTHER_SEED = 1


@dataclass(frozen=True, kw_only=True)
class UserImages:
    """A user's images in the order in which they arrive; n images are always the first n.

    Attributes:
        user_id: whose.
        liked: RGB images.
        disliked: RGB images.
    """

    user_id: str
    liked: tuple[Image.Image, ...]
    disliked: tuple[Image.Image, ...]

    @staticmethod
    def of(user: StudyUser, *, seed: int, most: int) -> UserImages:
        """The first ``most`` of either side, in an order drawn by user and seed."""
        rng = rng_for(seed=seed, epoch=0, key=user.user_id, purpose="dial order")
        sides = []
        for pixels in (user.liked, user.disliked):
            rows = [int(i) for i in rng.permutation(len(pixels))[:most]]
            sides.append(tuple(to_pil(pixels[rows])) if rows else ())
        return UserImages(user_id=user.user_id, liked=sides[0], disliked=sides[1])


class ProfileShelf:
    """The profiles of all users, made where they are not there yet.

    Attributes:
        folder: one folder a set in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, made: ProfileSet, *, user_id: str) -> Path:
        """Where a user's profile of a set lies."""
        return self.folder / made.name / f"{safe_name(user_id)}.safetensors"

    def load(self, made: ProfileSet, *, users: Sequence[StudyUser]) -> list[UserProfile]:
        """One profile a user, in their order.

        Raises:
            CheckpointError: one is not there or torn.
        """
        return [UserProfile.load(self.path(made, user_id=user.user_id)) for user in users]

    def is_complete(self, *, plan: DialPlan, users: Sequence[StudyUser]) -> bool:
        """Whether nothing is left to make, so that the MLLM need not be read."""
        return all(
            self.path(made, user_id=user.user_id).is_file() for made in plan.profile_sets() for user in users
        )

    def fill(
        self,
        taste: TasteModels,
        *,
        plan: DialPlan,
        users: Sequence[StudyUser],
        seed: int,
        progress: Callable[[int], object],
    ) -> None:
        """Make what is missing.

        Args:
            taste: the models.
            plan: which sets.
            users: whose.
            seed: of the images' order and of the draws.
            progress: called with the number of users just done.
        """
        most = max(plan.reference, *plan.images)
        for user in users:
            images = UserImages.of(user, seed=seed, most=most)
            for made in plan.profile_sets():
                path = self.path(made, user_id=user.user_id)
                if made.making == "updated" or _is_whole(path, taste=taste):
                    continue
                build_one(taste, images=images, made=made, seed=seed).save(path)
            self._update(taste, images=images, plan=plan, seed=seed)
            progress(1)

    def _update(self, taste: TasteModels, *, images: UserImages, plan: DialPlan, seed: int) -> None:
        """One image after another, liked and disliked in turn, a file at every number of the plan."""
        stops = {n: ProfileSet(making="updated", images=n) for n in plan.images[1:]}
        places = {n: self.path(made, user_id=images.user_id) for n, made in stops.items()}
        if all(_is_whole(path, taste=taste) for path in places.values()):
            return
        start = plan.images[0]
        first = ProfileSet(making="built", images=start)
        profile = UserProfile.load(self.path(first, user_id=images.user_id))
        for count in range(start + 1, plan.images[-1] + 1):
            for side in SIDES:
                new = getattr(images, side)[count - 1 : count]
                if new:
                    profile = taste.update_profile(profile, **{side: new}, seed=seed)
            if count in places:
                profile.save(places[count])


def build_one(taste: TasteModels, *, images: UserImages, made: ProfileSet, seed: int) -> UserProfile:
    """A profile of a set that is built, not updated."""
    disliked = () if made.making == "liked" else images.disliked[: made.images]
    draws = seed + _OTHER_SEED if made.making == "reseeded" else seed
    return taste.build_profile(images.liked[: made.images], disliked=disliked, seed=draws)


def _is_whole(path: Path, *, taste: TasteModels) -> bool:
    if not path.is_file():
        return False
    try:
        return dict(UserProfile.load(path).lineage) == taste.lineage
    except CheckpointError:
        return False
