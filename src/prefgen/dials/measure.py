"""A finished workdir in, one json a condition out: utilities and prompt fidelity of every user's pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefgen.dials.plan import Condition, DialPlan
from prefgen.dials.profiles import ProfileShelf
from prefgen.errors import DataError
from prefgen.evaluate.alignment import derangement
from prefgen.evaluate.judges import Judge
from prefgen.models.pixels import to_uint8
from prefgen.models.sampling import SampleUsers
from prefgen.models.user_adapter import UserAdapter
from prefgen.painter import profile_parts
from prefgen.profile import UserProfile
from prefgen.study.drawing import DrawSettings, Studio
from prefgen.study.judged import judge_pictures
from prefgen.study.users import StudyUser
from prefgen.whole_file import write_json

SHOWN_USERS = 6
"""Users whose first picture of every condition is kept, to be looked at."""

Table = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the judge says of one condition.

    Attributes:
        utility: (U,P) liked minus disliked probability over the judged attributes.
        fidelity: (U,) share of pictures whose prompt's subject the judge names.
        pixels: SHA-256 of all pictures: equal ones are equal to the last bit.
        shown: (S,H,W,3) uint8, the first picture of the first users.
    """

    utility: Table
    fidelity: Table
    pixels: str
    shown: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything a condition is drawn and judged with.

    Attributes:
        studio: pipeline and projector.
        adapters: ``own`` and, unless it is left out, ``image_only``.
        users: U users with P prompts each.
        judge: reads the pictures.
        pool: subjects it tells apart.
        judged: attributes it reads reliably.
        settings: steps, guidance, batch size.
        shelf: the profiles.
        seed: of who is whose other.
    """

    studio: Studio
    adapters: Mapping[str, UserAdapter]
    users: Sequence[StudyUser]
    judge: Judge
    pool: Sequence[str]
    judged: Sequence[str]
    settings: DrawSettings
    shelf: ProfileShelf
    seed: int

    def draw(self, condition: Condition, *, progress: Callable[[int], object]) -> Tensor:
        """(U,P,3,H,W) pixels in [-1,1] of one condition, from the same prompts and noise as any other."""
        prompts = [prompt for user in self.users for prompt in user.prompts]
        pixels = self.studio.draw_for(
            prompts,
            seeds=[seed for user in self.users for seed in user.seeds],
            settings=self.settings,
            users=self._sample_users(condition),
            progress=progress,
        )
        return pixels.reshape(len(self.users), -1, *pixels.shape[1:])

    def measure(self, condition: Condition, *, progress: Callable[[int], object]) -> Measured:
        """Draw and judge."""
        pixels = self.draw(condition, progress=progress)
        found = judge_pictures(
            self.judge, users=self.users, drawn={"own": pixels}, pool=self.pool, judged=self.judged
        )
        return Measured(
            utility=found.utilities["own"],
            fidelity=found.fidelity["own"],
            pixels=hashlib.sha256(to_uint8(pixels.flatten(0, 1)).tobytes()).hexdigest(),
            shown=to_uint8(pixels[:SHOWN_USERS, 0]),
        )

    @torch.no_grad()
    def _sample_users(self, condition: Condition) -> SampleUsers | None:
        if condition.profiles is None:
            return None
        profiles = self.shelf.load(condition.profiles, users=self.users)
        if condition.who == "other":
            profiles = [profiles[i] for i in derangement(len(profiles), seed=self.seed)]
        adapter = self.adapters["image_only" if condition.who == "image_only" else "own"]
        rows, negative = self._rows(profiles, adapter=adapter), None
        if condition.negative_scale:
            negative = self._rows(profiles, adapter=adapter, side="disliked")
        return SampleUsers.of_rows(
            adapter,
            rows=rows,
            scale=condition.user_scale,
            negative_rows=negative,
            negative_scale=condition.negative_scale,
        )

    def _rows(self, profiles: Sequence[UserProfile], *, adapter: UserAdapter, side: Any = "liked") -> Tensor:
        """(U x P,parts,D) inputs of the fusion; a part that a profile does not know is zeros."""
        wanted = adapter.fusion.shape.parts
        rows = []
        for profile in profiles:
            parts = profile_parts(profile, wanted=wanted, projector=self.studio.projector, side=side)
            rows.append(adapter.fusion.rows({name: value[None] for name, value in parts.items()}))
        return torch.cat(rows).repeat_interleave(len(self.users[0].prompts), dim=0)


class Measurements:
    """The conditions' files in a folder, each written when it is measured.

    Attributes:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_there(self, condition: Condition) -> bool:
        """Whether it was measured."""
        return (self.folder / f"{condition.name}.json").is_file()

    def missing(self, plan: DialPlan, *, image_only: bool) -> list[Condition]:
        """What is still to be measured, in the plan's order."""
        wanted = [one for one in plan.conditions() if image_only or one.who != "image_only"]
        return [one for one in wanted if not self.is_there(one)]

    def save(self, condition: Condition, *, measured: Measured) -> None:
        """Write a condition's figures, its pictures first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.folder / f"{condition.name}.npy", measured.shown, allow_pickle=False)
        record = {
            "utility": measured.utility.tolist(),
            "fidelity": measured.fidelity.tolist(),
            "pixels": measured.pixels,
        }
        write_json(self.folder / f"{condition.name}.json", content=record, indent=None, allow_nan=False)

    def load(self, condition: Condition) -> Measured:
        """Read it back.

        Raises:
            DataError: it is not there or torn.
        """
        path = self.folder / f"{condition.name}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return Measured(
                utility=np.array(record["utility"], dtype=np.float64),
                fidelity=np.array(record["fidelity"], dtype=np.float64),
                pixels=str(record["pixels"]),
                shown=np.load(path.with_suffix(".npy"), allow_pickle=False),
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is missing or torn ({error}); remove it and run again") from None
