"""A workdir in, ``metrics.json``, ``timing.json`` and ``report.html`` out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefgen.config import resolve_path
from prefgen.errors import ConfigError
from prefgen.evaluate.judges import Judge
from prefgen.evaluate.report import ShownUser, write_report
from prefgen.precision import has_fast_bf16
from prefgen.study.asking import ask, mllm_form
from prefgen.study.conditions import draw_conditions, draw_extra, meanings, open_adapters, open_studio
from prefgen.study.config import EvaluateConfig, EvaluateExtraSection
from prefgen.study.further import ExtraWork
from prefgen.study.judged import (
    Intervals,
    copying_figures,
    judge_pictures,
    preference_figures,
    worst_users,
)
from prefgen.study.kept_drawings import kept_drawings
from prefgen.study.known_drawings import read_known_drawings
from prefgen.study.mllm_judge import MLLMJudge
from prefgen.study.stages import RUNS, align_figures, probe_figures, run_figures
from prefgen.study.users import StudyUser, load_users, prompt_pool
from prefgen.whole_file import write_json

logger = logging.getLogger(__name__)

METRICS_VERSION = 1
DIGITS = 6
"""Decimals in metrics.json: more than any interval is wide, fewer than a library's last bits."""


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What an evaluation left behind.

    Attributes:
        metrics: the content of metrics.json.
        places: ``report``, ``metrics``, ``timing`` -> path.
    """

    metrics: dict[str, Any]
    places: dict[str, Path]


class _Clock:
    """Seconds by part, kept apart from the figures: two runs of one seed give the same metrics.json."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        logger.info("evaluate: %s", name)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)


def run_study(config: EvaluateConfig) -> StudyResult:
    """Evaluate the artefacts of a workdir on its test users.

    Raises:
        PrefgenError: anything the user can mend.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    config = settled(config)
    clock, out = _Clock(), Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to out={out}: {error.strerror}; pass out=FOLDER") from None
    judge, mllm_judge = Judge.load(resolve_path(config.model.judge)), MLLMJudge.find(config)
    metrics: dict[str, Any] = {"version": METRICS_VERSION, "seed": config.seed}
    metrics["settings"] = _settings(config)
    metrics |= _stage_figures(config)
    with clock.part("questions"):
        metrics |= _questions(config, judge=judge)
    pictures, shown, tables = _pictures(config, judge=judge, mllm_judge=mllm_judge, clock=clock)
    metrics |= pictures
    metrics["missing"] = [*_missing(metrics, config=config), *metrics.get("extra", {}).get("missing", ())]
    metrics = _rounded(metrics)
    places = {name: out / file for name, file in FILES.items()}
    if tables:
        places["users"] = out / USERS_FILE
        _write(places["users"], _rounded(tables))
    _write(places["metrics"], metrics)
    _write(places["timing"], {"seconds": clock.seconds, "threads": torch.get_num_threads()})
    write_report(
        places["report"],
        metrics=metrics,
        shown=shown,
        conditions=meanings(config),
        heat_maps=_heat_maps(config),
        attribution=config.evaluate.attribution,
    )
    return StudyResult(metrics=metrics, places=places)


def settled(config: EvaluateConfig) -> EvaluateConfig:
    """The configuration with ``auto`` replaced by what suits this machine.

    Raises:
        ConfigError: a GPU is asked for where torch sees none.
    """
    model = config.model
    gpu = torch.cuda.is_available()
    if model.device == "cuda" and not gpu:
        raise ConfigError("model.device=cuda, but torch sees no GPU here; use model.device=cpu")
    device = ("cuda" if gpu else "cpu") if model.device == "auto" else model.device
    precision = model.precision
    if precision == "auto":
        fast = has_fast_bf16(accelerator="cpu" if device == "cpu" else "gpu")
        precision = "bfloat16" if fast else "float32"
    return replace(config, model=replace(model, device=device, precision=precision))


ORDINALS = {1: "", 2: "second ", 3: "third "}
USERS_FILE = "users.json"
FILES = {"report": "report.html", "metrics": "metrics.json", "timing": "timing.json"}


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """What the figures depend on, without places: a report does not change by moving a folder."""
    plain = {key: value for key, value in asdict(config.evaluate).items() if key != "attribution"}
    return {**plain, "precision": config.model.precision, "quantization": config.model.quantization}


def _stage_figures(config: EvaluateConfig) -> dict[str, Any]:
    model = config.model
    runs = {
        "vqa": Path(model.lora).parent,
        "probe": Path(model.probe).parent,
        "align": Path(model.align),
        "align_independent": Path(model.align_independent),
        "inject": Path(model.inject),
        "inject_image_only": Path(model.inject_image_only),
    }
    steps = {name: run_figures(runs[name]) for name in RUNS if runs[name] != Path()}
    return {
        "probe": probe_figures(resolve_path(model.probe)),
        "align": {
            "same_users": align_figures(runs["align"]),
            "independent": align_figures(runs["align_independent"]),
        },
        "stages": {name: found for name, found in steps.items() if found is not None},
    }


def _questions(config: EvaluateConfig, *, judge: Judge) -> dict[str, Any]:
    settings, cache = config.evaluate, config.data.feature_cache
    return ask(
        mllm=config.model.mllm,
        lora=resolve_path(config.model.lora),
        shards=resolve_path(config.data.shards),
        feature_cache=Path(cache) if cache else None,
        groups=judge.groups,
        num_references=settings.num_references,
        num_questions=settings.num_questions,
        max_users=settings.max_asked_users,
        in_bf16=config.model.precision == "bfloat16",
        form=mllm_form(config.model),
        seed=config.seed,
        num_resamples=settings.num_resamples,
    )


def _pictures(
    config: EvaluateConfig, *, judge: Judge, mllm_judge: MLLMJudge | None, clock: _Clock
) -> tuple[dict[str, Any], list[ShownUser], dict[str, Any]]:
    settings, seed = config.evaluate, config.seed
    studio = open_studio(config, kept=kept_drawings(config))
    shards = resolve_path(config.data.shards)
    pool = prompt_pool(shards, known=judge.subjects)
    users = load_users(
        shards,
        embeddings=resolve_path(config.data.embeddings),
        pool=pool,
        num_users=settings.num_users,
        num_prompts=settings.num_prompts,
        num_draws=settings.num_draws,
        image_size=studio.bundle.image_size,
        seed=seed,
    )
    intervals = Intervals(seed=seed, num_resamples=settings.num_resamples)
    with clock.part("judge on known drawings"):
        about_judge = read_known_drawings(config, judge=judge, users=users, studio=studio, pool=pool)
    adapters = open_adapters(config, studio=studio)
    with clock.part("drawing"):
        drawn = draw_conditions(config, studio=studio, users=users, judge=judge, adapters=adapters)
    rivals = draw_extra(config, studio=studio, users=users, adapters=adapters, timed=clock.part)
    drawn = {name: drawn[name] if name in drawn else rivals.drawn[name] for name in meanings(config)
             if name in drawn or name in rivals.drawn}  # fmt: skip
    more_pairs = [pair for name in rivals.drawn for pair in (("own", name), (name, "base"))]
    with clock.part("judging"):
        judged = judge_pictures(judge, users=users, drawn=drawn, pool=pool, judged=about_judge["judged"])
        figures = preference_figures(judged, intervals=intervals, more_pairs=more_pairs)
        figures["copying"] = copying_figures(drawn, users=users, studio=studio, intervals=intervals)
    worst = worst_users(judged, count=settings.num_worst_users)
    figures |= {
        "judge": about_judge,
        "num_users": len(users),
        "num_prompts": settings.num_prompts,
        "subjects": list(pool),
        "worst_users": [users[i].user_id for i in worst],
    }
    first = list(range(min(settings.num_shown_users, len(users))))
    titles = {i: f"number {i + 1} of {len(users)}" for i in {*first, *worst}}
    for rank, i in enumerate(worst, start=1):
        titles[i] += f", gained {ORDINALS.get(rank, f'{rank}th ')}least"
    margins = (judged.utilities["own"] - judged.utilities["base"]).mean(axis=1)
    chosen = [*first, *(i for i in worst if i not in first)]
    shown = [
        _shown(users[i], title=titles[i], margin=float(margins[i]), drawn=drawn, row=i, worst=i in worst)
        for i in chosen
    ]
    work = ExtraWork(config=config, judge=judge, studio=studio, users=users, drawn=drawn, judged=judged,
                     mllm_judge=mllm_judge)  # fmt: skip
    with clock.part("further figures") if config.extra != EvaluateExtraSection() else nullcontext():
        found, tables = work.run(words=about_judge["judged"], facts=rivals.facts, margins=margins)
    return figures | found, shown, tables


def _shown(
    user: StudyUser, *, title: str, margin: float, drawn: Mapping[str, Tensor], row: int, worst: bool
) -> ShownUser:
    return ShownUser(
        title=f"{user.user_id}, {title}",
        margin=margin,
        worst=worst,
        likes=user.history.liked_attributes,
        dislikes=user.history.disliked_attributes,
        liked=user.liked[user.shown("liked")],
        disliked=user.disliked[user.shown("disliked")],
        anchor=user.liked[user.anchor_position][None],
        prompts=user.prompts,
        pictures={name: pixels[row] for name, pixels in drawn.items()},
    )


def _heat_maps(config: EvaluateConfig) -> dict[str, Path]:
    folder = resolve_path(config.model.probe).parent
    found = {task: folder / f"{task}_user.png" for task in ("inter", "intra")}
    return {task: path for task, path in found.items() if path.is_file()}


def _missing(metrics: Mapping[str, Any], *, config: EvaluateConfig) -> list[str]:
    """What could not be reported, in words and with the way to mend it."""
    words = []
    if metrics["align"]["same_users"] is None:
        words.append("figures of stage align: run 'prefgen fit --stage align' in this workdir")
    if metrics["align"]["independent"] is None:
        words.append(
            'the second pairing of stage align: run "prefgen fit --stage align align.pairing=independent '
            "run_dir='${workdir}/align_independent'\" in this workdir"
        )
    if not config.model.inject_image_only:
        words.append("the image-only comparison: model.inject_image_only is empty")
    if "oracle" not in metrics:
        words.append("the oracle: the histories name no true attributes of their images")
    if "words" not in metrics["utility"]:
        words.append("the prompt with true attributes in words: the users' liked attributes are not known")
    if not metrics["judge"]["judged"]:
        words.append("every win rate is a tie: the judge reads no attribute reliably on the VAE round trip")
    if metrics["num_users"] < config.evaluate.num_users:
        words.append(f"{config.evaluate.num_users} users were asked for, {metrics['num_users']} found")
    return words


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_json(path, content=content, sort_keys=True, allow_nan=False)
