"""Beyond the plain report, when asked: more figures, every user's numbers, pictures as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from prefgen.config import resolve_path
from prefgen.evaluate.judges import Judge
from prefgen.evaluate.picture_folder import PictureUser, save_user_pictures, write_index
from prefgen.study.config import EvaluateConfig
from prefgen.study.drawing import Studio
from prefgen.study.extra import Extra, extra_figures
from prefgen.study.judged import Intervals, Judged
from prefgen.study.mllm_judge import Choices, MLLMJudge, ask_mllm_judge
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
        mllm_judge: an MLLM that chooses between pictures, if one is asked.
    """

    config: EvaluateConfig
    judge: Judge
    studio: Studio
    users: Sequence[StudyUser]
    drawn: Mapping[str, Tensor]
    judged: Judged
    mllm_judge: MLLMJudge | None = None

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
        measured = bool(extra.figures or extra.scorers or self.mllm_judge)
        if not (measured or extra.conditions):
            return {}, {}
        figures: dict[str, Any] = {"settings": asdict(extra) | self._names()}
        figures["conditions"] = {name: dict(found) for name, found in facts.items()}
        if not measured:
            return {"extra": figures}, {}
        found = self._figures(words)
        figures |= found.figures
        if self.mllm_judge is not None:
            choices = self._choices(self.mllm_judge)
            figures["mllm_judge"] = choices.figures
            found.tables["mllm_wins"] = choices.wins
        figures["structure"] = self._structure()
        figures["missing"] = list(found.missing)
        return {"extra": figures}, self._tables(found)

    def _names(self) -> dict[str, Any]:
        """Settings that name places, without them: a report does not change by moving a folder."""
        judge = self.mllm_judge
        return {
            "scorers": [word.partition(":")[0] for word in self.config.extra.scorers],
            "mllm_judge": judge.family if judge is not None else "",
        }

    def _choices(self, judge: MLLMJudge) -> Choices:
        total = (len(self.drawn) - 1) * sum(len(user.prompts) for user in self.users)
        with tqdm(total=total, unit="pair", desc="MLLM judge") as bar:
            return ask_mllm_judge(
                judge,
                users=self.users,
                drawn=self.drawn,
                intervals=self._intervals(),
                progress=bar.update,
            )

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
