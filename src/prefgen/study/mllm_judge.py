"""An MLLM as judge: which of two pictures of one prompt would this user choose? Asked in both orders.

The judge sees liked and disliked images of the user's history that no picture was drawn from, as far as the
history reaches, and own's picture beside that of another condition from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefgen.config import resolve_path
from prefgen.errors import ConfigError
from prefgen.evaluate.comparing import Comparison, compare, corrected
from prefgen.evaluate.order_swap import OrderFlips, SwappedWinRate, first_chosen, swapped_wins
from prefgen.models.choosing import choice_margins
from prefgen.models.families import family_of
from prefgen.models.pixels import to_pil
from prefgen.models.questions import history_pieces
from prefgen.stages.features import model_hash
from prefgen.study.asking import MLLMForm, mllm_form
from prefgen.study.config import EvaluateConfig
from prefgen.study.judged import Intervals
from prefgen.study.users import StudyUser


@dataclass(frozen=True, kw_only=True)
class MLLMJudge:
    """Who judges.

    Attributes:
        path: its folder.
        family: see :mod:`prefgen.models.families`.
        hash: of its weights.
        independent: its weights are known not to be those that stage vqa started from.
        num_references: most images of either side of the history that it is shown.
        form: in which form it is held.
    """

    path: Path
    family: str
    hash: str
    independent: bool
    num_references: int
    form: MLLMForm

    @staticmethod
    def find(config: EvaluateConfig) -> MLLMJudge | None:
        """The judge that the configuration names, checked before anything is drawn; None without one.

        Raises:
            ConfigError: its weights are those of ``model.mllm``, which may not judge itself, or that is no
                folder to compare them with.
            CheckpointError: not a multimodal LLM that prefgen knows.
        """
        extra = config.extra
        if not extra.mllm_judge:
            return None
        path = resolve_path(extra.mllm_judge)
        family, found = family_of(path).name, model_hash(str(path))
        independent = _is_another(found, own=config.model.mllm)
        if not independent and not extra.allow_own_mllm_judge:
            raise ConfigError(
                f"extra.mllm_judge={extra.mllm_judge} holds the weights of model.mllm, from which stage vqa "
                "trained, or that is no folder to compare them with; name another multimodal LLM, or pass "
                "extra.allow_own_mllm_judge=true to have the report say that it is not independent"
            )
        half = config.model.precision == "bfloat16"
        return MLLMJudge(
            path=path,
            family=family,
            hash=found,
            independent=independent,
            num_references=config.evaluate.num_references,
            form=replace(mllm_form(config.model), dtype=torch.bfloat16 if half else torch.float32),
        )

    def margins(
        self,
        users: Sequence[StudyUser],
        *,
        drawn: Mapping[str, Tensor],
        progress: Callable[[int], object],
    ) -> dict[str, Tensor]:
        """Condition -> (U P, 2) margins of own against it, as given and with the two pictures exchanged.

        Args:
            users: U users.
            drawn: condition -> (U,P,3,H,W), own among them.
            progress: called with the number of pairs just asked about.

        Raises:
            CheckpointError: the folder cannot be loaded.
            DataError: histories and pictures are longer than the model was built for.
        """
        model = self.form.load(self.path)
        names = [name for name in drawn if name != "own"]
        rows = []
        for number, user in enumerate(users):
            liked = user.held_back("liked", count=self.num_references)
            disliked = user.held_back("disliked", count=self.num_references)
            shown = [*to_pil(user.liked[liked]), *to_pil(user.disliked[disliked])]
            pictures = [picture for name in ("own", *names) for picture in to_pil(drawn[name][number])]
            features = model.encode_images([*shown, *pictures])
            count, first = len(user.prompts), len(shown)
            pairs = [
                (first + i, first + place * count + i)
                for place in range(1, len(names) + 1)
                for i in range(count)
            ]
            history = history_pieces(range(len(liked)), disliked=range(len(liked), len(shown)))
            found = choice_margins(model, history=history, pairs=pairs, image_features=features)
            rows.append(found.view(len(names), count, 2))
            progress(len(pairs))
        return {name: torch.cat([row[i] for row in rows]) for i, name in enumerate(names)}


def _is_another(found: str, *, own: str) -> bool:
    """Whether a hash is known to differ from that of ``model.mllm``; a hub id has none that says anything."""
    mine = model_hash(own)
    return not mine.startswith("hub:") and mine != found


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the judge said.

    Attributes:
        figures: plain json for metrics.json, under ``extra.mllm_judge``.
        wins: condition -> (U,) how often own is chosen against it, ties half.
    """

    figures: dict[str, Any]
    wins: dict[str, NDArray[np.float64]]


def ask_mllm_judge(
    judge: MLLMJudge,
    *,
    users: Sequence[StudyUser],
    drawn: Mapping[str, Tensor],
    intervals: Intervals,
    progress: Callable[[int], object],
) -> Choices:
    """Ask, and count: see :meth:`MLLMJudge.margins` and :func:`choice_figures`."""
    margins = judge.margins(users, drawn=drawn, progress=progress)
    found = choice_figures(margins, num_users=len(users), intervals=intervals)
    about = {
        "family": judge.family,
        "hash": judge.hash[:12],
        "independent": judge.independent,
        "num_references": judge.num_references,
    }
    return replace(found, figures={**about, **found.figures})


def choice_figures(margins: Mapping[str, Tensor], *, num_users: int, intervals: Intervals) -> Choices:
    """Win rates of own with tests against one half (one Holm family), and how far places decide.

    Args:
        margins: condition -> (U P, 2), see :meth:`MLLMJudge.margins`; a user's pairs stand together.
        num_users: U.
        intervals: seed and resamplings.
    """
    settings = asdict(intervals)
    rows: dict[str, dict[str, Any]] = {}
    wins: dict[str, NDArray[np.float64]] = {}
    tests: dict[str, Comparison] = {}
    everything = OrderFlips(**settings)
    places: list[float] = []
    for name, pairs in margins.items():
        given, exchanged = pairs.unbind(dim=1)
        owners = torch.arange(num_users).repeat_interleave(len(pairs) // num_users)
        rate, flips = SwappedWinRate(**settings), OrderFlips(**settings)
        for metric in (rate, flips, everything):
            metric.update(given, exchanged, users=owners)
        wins[name] = rate.per_user()
        tests[name] = compare(wins[name], np.full(num_users, 0.5), **settings)
        first = first_chosen(given, exchanged)
        places += first.tolist()
        rows[name] = {
            "wins": asdict(rate.estimate()),
            "ties": float((swapped_wins(given, exchanged) == 0.5).double().mean()),
            "flips": asdict(flips.estimate()),
            "first_chosen": float(first.mean()),
        }
    for name, test in corrected(tests).items():
        rows[name] |= {"p": test.p, "p_holm": test.p_holm}
    overall = {"flips": asdict(everything.estimate()), "first_chosen": float(np.mean(places))}
    return Choices(figures={"own_against": rows, **overall}, wins=wins)
