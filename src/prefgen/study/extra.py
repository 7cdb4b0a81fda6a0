"""Figures on request: margins with tests, hits, likeness, distances between sets, diversity, Elo, scorers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefgen.errors import CheckpointError
from prefgen.evaluate.comparing import compare, corrected
from prefgen.evaluate.judges import Judge
from prefgen.evaluate.likeness import HistoryLikeness, PairCosine, UserDiversity
from prefgen.evaluate.per_user import MeanScore, PerUserMetric
from prefgen.evaluate.preference import AttributeHits, user_wins
from prefgen.evaluate.scorers import SCORERS, HistoryScorer, ImageEmbedder, load_scorer
from prefgen.evaluate.set_distances import CMMD, FrechetDistance, KernelDistance, bootstrap_sets
from prefgen.evaluate.strengths import EloRatings
from prefgen.evaluate.viper import MAX_PAIRS
from prefgen.models.clip import Clip
from prefgen.models.pixels import to_pil
from prefgen.study.config import EvaluateExtraSection
from prefgen.study.drawing import Studio
from prefgen.study.judged import Intervals, Judged
from prefgen.study.users import StudyUser

Table = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What was found.

    Attributes:
        figures: plain json for metrics.json, under ``extra``.
        tables: figure -> condition -> (U,) numbers, for users.json; NaN where a user says nothing.
        missing: what could not be measured, in words.
    """

    figures: dict[str, Any]
    tables: dict[str, dict[str, Table]]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What every figure is made from."""

    judge: Judge
    judged: Judged
    words: frozenset[str]
    users: Sequence[StudyUser]
    drawn: Mapping[str, Tensor]
    studio: Studio
    intervals: Intervals

    @property
    def owners(self) -> Tensor:
        """(U P,) number of each picture's user."""
        return torch.arange(len(self.users)).repeat_interleave(len(self.users[0].prompts))

    def prompts(self, name: str) -> list[str]:
        """What each picture of a condition shows or should show."""
        if name == "real":
            return [user.history.liked[i].prompt for user in self.users for i in user.real]
        return [prompt for user in self.users for prompt in user.prompts]

    def full(self, metric: PerUserMetric) -> Table:
        """(U,) of all users, NaN where the metric passed one over."""
        table = np.full(len(self.users), np.nan)
        if metric.users:
            table[metric.user_numbers()] = metric.per_user()
        return table


def extra_figures(
    judge: Judge,
    *,
    judged: Judged,
    words: Sequence[str],
    users: Sequence[StudyUser],
    drawn: Mapping[str, Tensor],
    studio: Studio,
    pipeline: Path,
    extra: EvaluateExtraSection,
    intervals: Intervals,
) -> Extra:
    """Everything that ``extra.figures`` adds.

    Args:
        judge: the judge.
        judged: its word on the pictures.
        words: attributes it reads reliably.
        users: U users.
        drawn: condition -> (U,P,3,H,W).
        studio: the pipeline, whose image encoder gives the embeddings.
        pipeline: its folder, for the text side of CLIP-T.
        extra: the settings.
        intervals: seed and resamplings.
    """
    case = _Case(
        judge=judge, judged=judged, words=frozenset(words), users=users, drawn=drawn, studio=studio,
        intervals=intervals,
    )  # fmt: skip
    tables: dict[str, dict[str, Table]] = {
        "utility": {name: values.mean(axis=1) for name, values in judged.utilities.items()},
        "prompt_fidelity": dict(judged.fidelity),
        "liked_hits": _hits(case, side="liked"),
        "disliked_hits": _hits(case, side="disliked"),
    }
    for name in judged.utilities:
        if name != "own":
            wins = user_wins(judged.utilities["own"], judged.utilities[name])
            tables.setdefault("own_wins", {})[name] = wins
    embeds = {name: studio.bundle.embed_images(pixels.flatten(0, 1)) for name, pixels in drawn.items()}
    missing: list[str] = []
    tables |= _likeness(case, embeds=embeds, pipeline=pipeline, missing=missing)
    tables |= _scored(case, scorers=extra.scorers)
    figures: dict[str, Any] = {
        name: {condition: _estimate(values, intervals=intervals) for condition, values in rows.items()}
        for name, rows in tables.items()
    }
    figures["margins"] = _margins(tables, intervals=intervals)
    figures["elo"] = _elo(case)
    if extra.num_set_resamples:
        figures["sets"] = _sets(case, embeds=embeds, draws=extra.num_set_resamples)
    return Extra(figures=figures, tables=tables, missing=tuple(missing))


def _estimate(values: Table, *, intervals: Intervals) -> dict[str, Any] | None:
    known = values[~np.isnan(values)]
    return intervals.of(known) if known.size else None


def _margins(tables: Mapping[str, Mapping[str, Table]], *, intervals: Intervals) -> dict[str, Any]:
    """Own minus each other condition, in utility and in prompt fidelity; each figure is one Holm family."""
    found: dict[str, Any] = {}
    for figure in ("utility", "prompt_fidelity"):
        own = tables[figure]["own"]
        family = {
            name: compare(own, values, seed=intervals.seed, num_resamples=intervals.num_resamples)
            for name, values in tables[figure].items()
            if name != "own"
        }
        found[figure] = {name: asdict(one) for name, one in corrected(family).items()}
    return found


def _hits(case: _Case, *, side: str) -> dict[str, Table]:
    wanted = [getattr(user.history, f"{side}_attributes") for user in case.users for _ in user.prompts]
    rows = {}
    for name, judgement in case.judged.judgements.items():
        metric = AttributeHits(groups=case.judge.groups, judged=case.words)
        metric.update(judgement.groups, wanted=wanted, users=case.owners)
        rows[name] = case.full(metric)
    return rows


def _likeness(
    case: _Case, *, embeds: Mapping[str, Tensor], pipeline: Path, missing: list[str]
) -> dict[str, dict[str, Table]]:
    """CLIP-I and diversity by the pipeline's image encoder, CLIP-T where its text side belongs to it."""
    tables: dict[str, dict[str, Table]] = {"clip_image": {}}
    liked = [_liked_embeds(user) for user in case.users for _ in user.prompts]
    for name, rows in embeds.items():
        metric = HistoryLikeness()
        metric.update(rows, liked=liked, users=case.owners)
        tables["clip_image"][name] = case.full(metric)
    if len(case.users[0].prompts) > 1:
        tables["diversity"] = {}
        for name, rows in embeds.items():
            spread = UserDiversity()
            spread.update(rows, users=case.owners)
            tables["diversity"][name] = case.full(spread)
    else:
        missing.append("diversity within a user: evaluate.num_prompts=1 draws one picture a user")
    try:
        clip = Clip.load(pipeline)
    except CheckpointError:
        missing.append("CLIP-T: the pipeline's text and image encoders are not joined into one CLIP")
        return tables
    tables["clip_text"] = {}
    for name, rows in embeds.items():
        pairs = PairCosine()
        pairs.update(rows, clip.embed_texts(case.prompts(name)), users=case.owners)
        tables["clip_text"][name] = case.full(pairs)
    return tables


def _liked_embeds(user: StudyUser) -> Tensor:
    """(N,D) embeddings of the liked references; of all liked images where there are none."""
    keys = [key for key in user.embeddings.image_keys if "/liked." in key]
    shown = [key for key in keys if key in user.references] or keys
    return torch.from_numpy(user.embeddings.image[[user.embeddings.image_keys.index(k) for k in shown]])


def _scored(case: _Case, *, scorers: Sequence[str]) -> dict[str, dict[str, Table]]:
    tables: dict[str, dict[str, Table]] = {}
    for word in scorers:
        name, _, folder = word.partition(":")
        scorer, kind = load_scorer(name, weights=Path(folder)), SCORERS[name].kind
        rows = {}
        for condition, pixels in case.drawn.items():
            if kind == "embedding":
                metric: PerUserMetric = _likeness_by(scorer, pixels=pixels, case=case)
            else:
                metric = MeanScore()
            if kind == "prompt":
                pictures = to_pil(pixels.flatten(0, 1))
                metric.update(scorer.score(pictures, prompts=case.prompts(condition)), users=case.owners)
            elif kind == "pair" and pixels.shape[1] > 1:
                # Neighbouring pictures of one user: how much they differ.
                pairs = scorer.distance(pixels[:, :-1].flatten(0, 1), pixels[:, 1:].flatten(0, 1))
                owners = torch.arange(len(pixels)).repeat_interleave(pixels.shape[1] - 1)
                metric.update(pairs, users=owners)
            elif kind == "history":
                _score_by_history(scorer, metric=metric, pixels=pixels, users=case.users)
            rows[condition] = case.full(metric)
        tables[name] = rows
    return tables


def _likeness_by(embedder: ImageEmbedder, *, pixels: Tensor, case: _Case) -> HistoryLikeness:
    liked = [
        embedder.embed(to_pil(user.liked[user.shown("liked") or [user.anchor_position]]))
        for user in case.users
    ]
    metric = HistoryLikeness()
    metric.update(
        embedder.embed(to_pil(pixels.flatten(0, 1))),
        liked=[own for own in liked for _ in range(pixels.shape[1])],
        users=case.owners,
    )
    return metric


def _score_by_history(
    scorer: HistoryScorer, *, metric: PerUserMetric, pixels: Tensor, users: Sequence[StudyUser]
) -> None:
    """Users who have nothing on one side of their history are passed over."""
    for number, user in enumerate(users):
        liked = user.liked[user.held_back("liked", count=MAX_PAIRS)]
        disliked = user.disliked[user.held_back("disliked", count=MAX_PAIRS)]
        if len(liked) and len(disliked):
            told = {"liked": to_pil(liked), "disliked": to_pil(disliked)}
            scores = scorer.score(to_pil(pixels[number]), **told)
            metric.update(scores, users=torch.full((len(scores),), number))


def _elo(case: _Case) -> dict[str, Any]:
    names = list(case.judged.utilities)
    metric = EloRatings(conditions=names, seed=case.intervals.seed)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            own, against = case.judged.utilities[first], case.judged.utilities[second]
            won = (own > against) + 0.5 * (own == against)
            metric.update(first, second, won=torch.from_numpy(won.ravel()), users=case.owners)
    return {name: asdict(found) for name, found in metric.ratings().items()}


def _sets(case: _Case, *, embeds: Mapping[str, Tensor], draws: int) -> dict[str, Any]:
    """FID and KID on the judge's last hidden layer, CMMD on the pipeline's image embeddings.

    The other side is all liked drawings of the same users: what one would see if pictures followed taste.
    """
    users, seed = case.users, case.intervals.seed
    real = {
        "judge": [judge_features(case.judge, user.liked) for user in users],
        "image": [_all_liked(user) for user in users],
    }
    found: dict[str, Any] = {"fid": {}, "kid": {}, "cmmd": {}}
    for name, pixels in case.drawn.items():
        if name == "real":
            continue
        own = {
            "judge": list(judge_features(case.judge, pixels.flatten(0, 1)).chunk(len(users))),
            "image": list(embeds[name].chunk(len(users))),
        }
        for figure, features in (("fid", "judge"), ("kid", "judge"), ("cmmd", "image")):
            sides = own[features], real[features]

            def statistic(rows: NDArray[np.int64], figure: str = figure, sides: Any = sides) -> float:
                drawn, known = (torch.cat([side[int(i)] for i in rows]) for side in sides)
                return set_distance(drawn, known, figure=figure)

            estimate = bootstrap_sets(statistic, num_users=len(users), seed=seed, draws=draws)
            found[figure][name] = asdict(estimate)
    return found


def _all_liked(user: StudyUser) -> Tensor:
    rows = [i for i, key in enumerate(user.embeddings.image_keys) if "/liked." in key]
    return torch.from_numpy(user.embeddings.image[rows])


@torch.no_grad()
def judge_features(judge: Judge, pixels: Tensor) -> Tensor:
    """(B,256) the judge's last hidden layer: features that trained nothing here."""
    features: Tensor = judge.eval().mix(judge.pool(judge.trunk(pixels)).flatten(1))
    return features


def set_distance(drawn: Tensor, known: Tensor, *, figure: str) -> float:
    """``fid``, ``kid`` or ``cmmd`` between drawn (N,D) and known (M,D) features."""
    if figure == "cmmd":
        cmmd = CMMD()
        cmmd.update(x=drawn, y=known)
        return float(cmmd.compute())
    metric = FrechetDistance(num_features=drawn.shape[1]) if figure == "fid" else KernelDistance()
    metric.update(drawn, real=False)
    metric.update(known, real=True)
    return float(metric.compute())
