"""Beyond the plain report, when asked: more figures, every user's numbers, pictures as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prefgen.config import resolve_path
from prefgen.evaluate.judges import Judge
from prefgen.evaluate.picture_folder import PictureUser, save_user_pictures, write_index
from prefgen.study.config import EvaluateConfig
from prefgen.study.drawing import Studio
from prefgen.study.extra import Extra, extra_figures
from prefgen.study.judged import Intervals, Judged
from prefgen.study.structure import structure_figures
from prefgen.study.users import StudyUser

PICTURES = "pictures"
TABLES_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ExtraWork:
    """One evaluation after its pictures are judged.

    Attributes:
        config: the whole configuration.
        judge: the judge.
        studio: the pipeline.
        users: U users.
        drawn: condition -> (U,P,3,H,W).
        judged: the judge's word on them.
    """

    config: EvaluateConfig
    judge: Judge
    studio: Studio
    users: Sequence[StudyUser]
    drawn: Mapping[str, Tensor]
    judged: Judged

    def run(
        self, *, words: Sequence[str], facts: Mapping[str, Mapping[str, Any]], margins: NDArray[np.float64]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """``extra`` for metrics.json and the content of users.json; both empty where nothing is asked for.

        Args:
            words: attributes the judge reads reliably.
            facts: what the extra conditions say about themselves.
            margins: (U,) mean utility of own minus base, for the pictures' notes.
        """
        extra = self.config.extra
        if extra.save_pictures:
            self._save_pictures(margins)
        if not (extra.figures or extra.conditions or extra.scorers):
            return {}, {}
        figures: dict[str, Any] = {"settings": asdict(extra) | {"scorers": self._scorer_names()}}
        figures["conditions"] = {name: dict(found) for name, found in facts.items()}
        if not (extra.figures or extra.scorers):
            return {"extra": figures}, {}
        found = self._figures(words)
        figures |= found.figures
        figures["structure"] = self._structure()
        figures["missing"] = list(found.missing)
        return {"extra": figures}, self._tables(found)

    def _scorer_names(self) -> list[str]:
        """Without places: a report does not change by moving a folder."""
        return [word.partition(":")[0] for word in self.config.extra.scorers]

    def _intervals(self) -> Intervals:
        return Intervals(seed=self.config.seed, num_resamples=self.config.evaluate.num_resamples)

    def _figures(self, words: Sequence[str]) -> Extra:
        return extra_figures(
            self.judge,
            judged=self.judged,
            words=words,
            users=self.users,
            drawn=self.drawn,
            studio=self.studio,
            pipeline=resolve_path(self.config.model.pipeline),
            extra=self.config.extra,
            intervals=self._intervals(),
        )

    def _structure(self) -> dict[str, Any]:
        return structure_figures(
            resolve_path(self.config.data.embeddings),
            projector=resolve_path(self.config.model.align) / "projector.safetensors",
            pipeline=resolve_path(self.config.model.pipeline),
            seed=self.config.seed,
            num_resamples=self.config.evaluate.num_resamples,
        )

    def _tables(self, found: Extra) -> dict[str, Any]:
        """Every user's numbers: what a study over several runs pairs and pools. NaN becomes null."""
        return {
            "version": TABLES_VERSION,
            "seed": self.config.seed,
            "users": [user.user_id for user in self.users],
            "prompts": [list(user.prompts) for user in self.users],
            "tables": {
                figure: {
                    name: [None if np.isnan(value) else float(value) for value in values]
                    for name, values in rows.items()
                }
                for figure, rows in found.tables.items()
            },
        }

    def _save_pictures(self, margins: NDArray[np.float64]) -> None:
        root, users = Path(self.config.out) / PICTURES, []
        for row, user in enumerate(self.users):
            sets = {name: pixels[row] for name, pixels in self.drawn.items()}
            shown = {
                "liked": user.liked[user.shown("liked")], "disliked": user.disliked[user.shown("disliked")]
            }  # fmt: skip
            files = save_user_pictures(root, name=f"{row:04d}", sets={**sets, **shown})
            users.append(
                PictureUser(
                    user_id=user.user_id,
                    liked=files["liked"],
                    disliked=files["disliked"],
                    prompts=user.prompts,
                    pictures={name: files[name] for name in sets},
                    note=_note(user, margin=float(margins[row])),
                )
            )
        write_index(root, users=users, attribution=self.config.evaluate.attribution)


def _note(user: StudyUser, *, margin: float) -> str:
    taste = ""
    if user.history.liked_attributes:
        taste = f"likes {', '.join(user.history.liked_attributes)}; "
    return f"{taste}utility gained over the base model: {margin:+.3f}"
