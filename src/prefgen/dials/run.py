"""From a finished workdir to ``dial.json``, report and plots; what is there already is not done again."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prefgen.config import resolve_path
from prefgen.data.embeddings import EmbeddingReader
from prefgen.data.index import INDEX_NAME
from prefgen.dials.figures import dial_figures
from prefgen.dials.measure import Bench, Measurements
from prefgen.dials.plan import DialPlan
from prefgen.dials.profiles import ProfileShelf
from prefgen.dials.report import write_dial
from prefgen.errors import ConfigError, DataError
from prefgen.evaluate.judges import Judge
from prefgen.lineage import hash_file
from prefgen.profile import PROFILE_PARTS
from prefgen.stages.features import model_source
from prefgen.study.asking import mllm_form
from prefgen.study.conditions import ADAPTER, draw_settings, open_adapters, open_studio
from prefgen.study.config import EvaluateConfig
from prefgen.study.known_drawings import read_known_drawings
from prefgen.study.run import settled
from prefgen.study.users import StudyUser, load_users, prompt_pool
from prefgen.taste import TasteModels
from prefgen.whole_file import write_json

logger = logging.getLogger(__name__)

DIAL_VERSION = 1
INPUTS = "inputs.json"
_SETTINGS = ("num_users", "num_prompts", "num_steps", "guidance_scale", "batch_size", "minimum_accuracy")


@dataclass(frozen=True, kw_only=True)
class DialResult:
    """What was written.

    Attributes:
        dial: the content of dial.json.
        places: ``json``, ``html``, ``markdown`` -> path.
    """

    dial: dict[str, Any]
    places: dict[str, Path]


def run_dial(config: EvaluateConfig, *, plan: DialPlan, out: Path) -> DialResult:
    """Measure every curve of a plan.

    Args:
        config: as of ``prefgen evaluate``; its ``evaluate`` section says how many users, prompts and steps.
        plan: the points.
        out: folder of everything; what lies there from the same inputs is kept.

    Raises:
        PrefgenError: anything the user can mend; a folder begun with other inputs among it.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    config = settled(config)
    settings, seed = config.evaluate, config.seed
    _check_inputs(config, plan=plan, out=out)
    judge = Judge.load(resolve_path(config.model.judge))
    studio = open_studio(config)
    pool = prompt_pool(resolve_path(config.data.shards), known=judge.subjects)
    users = load_users(
        resolve_path(config.data.shards),
        embeddings=resolve_path(config.data.embeddings),
        pool=pool,
        num_users=settings.num_users,
        num_prompts=settings.num_prompts,
        num_draws=settings.num_draws,
        image_size=studio.bundle.image_size,
        seed=seed,
    )
    shelf = ProfileShelf(out / "profiles")
    if not shelf.is_complete(plan=plan, users=users):
        _fill(shelf, config=config, plan=plan, users=users)
    bench = Bench(
        studio=studio,
        adapters=open_adapters(config, studio=studio),
        users=users,
        judge=judge,
        pool=pool,
        judged=_judged_words(config, out=out, judge=judge, users=users, studio=studio, pool=pool),
        settings=draw_settings(config),
        shelf=shelf,
        seed=seed,
    )
    measurements = Measurements(out / "conditions")
    _measure(bench, measurements=measurements, plan=plan)
    dial = {
        "version": DIAL_VERSION,
        "seed": seed,
        "settings": {name: getattr(settings, name) for name in (*_SETTINGS, "num_resamples")},
        "precision": config.model.precision,
        "plan": asdict(plan),
        "num_users": len(users),
        "judged": list(bench.judged),
        **dial_figures(
            plan,
            measurements=measurements,
            shelf=shelf,
            users=users,
            image_only="image_only" in bench.adapters,
            seed=seed,
            num_resamples=settings.num_resamples,
        ),
    }
    places = write_dial(dial, plan=plan, measurements=measurements, out=out, attribution=settings.attribution)
    return DialResult(dial=dial, places=places)


def _fill(shelf: ProfileShelf, *, config: EvaluateConfig, plan: DialPlan, users: list[StudyUser]) -> None:
    model = config.model
    lora = resolve_path(model.lora)
    taste = TasteModels.load(
        mllm=str(model_source(model.mllm)),
        lora=lora if lora.is_dir() else None,
        probe=resolve_path(model.probe),
        image_encoder=_image_encoder(config),
        **asdict(mllm_form(model)),
    )
    header = EmbeddingReader(resolve_path(config.data.embeddings), split="test").header
    for part in PROFILE_PARTS:
        if header.get(part) not in (None, taste.lineage[part]):
            raise DataError(
                f"{config.data.embeddings} was made by another {part} than the profiles would be; "
                "run 'prefgen predict --stage probe' and the stages after it again"
            )
    with tqdm(total=len(users), unit="user", desc="profiles", dynamic_ncols=True) as bar:
        shelf.fill(taste, plan=plan, users=users, seed=config.seed, progress=bar.update)


def _image_encoder(config: EvaluateConfig) -> Path:
    if config.model.image_encoder is not None:
        return resolve_path(config.model.image_encoder)
    return resolve_path(config.model.pipeline) / "image_encoder"


def _measure(bench: Bench, *, measurements: Measurements, plan: DialPlan) -> None:
    missing = measurements.missing(plan, image_only="image_only" in bench.adapters)
    total = len(missing) * sum(len(user.prompts) for user in bench.users)
    with tqdm(total=total, unit="image", desc="drawing", dynamic_ncols=True, delay=0.1) as bar:
        for condition in missing:
            bar.set_postfix_str(condition.name, refresh=False)
            measured = bench.measure(condition, progress=bar.update)
            measurements.save(condition, measured=measured)


def _judged_words(
    config: EvaluateConfig, *, out: Path, judge: Judge, users: list[StudyUser], studio: Any, pool: Any
) -> list[str]:
    """Attributes that the judge reads reliably on these users' images; kept in the folder."""
    path = out / "judge.json"
    if path.is_file():
        return list(json.loads(path.read_text(encoding="utf-8"))["judged"])
    about = read_known_drawings(config, judge=judge, users=users, studio=studio, pool=pool)
    write_json(path, content=about, allow_nan=False)
    return list(about["judged"])


def _check_inputs(config: EvaluateConfig, *, plan: DialPlan, out: Path) -> None:
    """Remember what the folder was begun with; points may be added later, nothing else may change.

    Raises:
        ConfigError: it was begun with something else, or cannot be written.
    """
    model, shards = config.model, resolve_path(config.data.shards)
    files = {
        "shards": shards / INDEX_NAME,
        "judge": resolve_path(model.judge),
        "probe": resolve_path(model.probe),
        "align": resolve_path(model.align) / "projector.safetensors",
        "inject": resolve_path(model.inject) / ADAPTER,
    }
    if model.inject_image_only:
        files["inject_image_only"] = resolve_path(model.inject_image_only) / ADAPTER
    settings = {f"evaluate.{name}": getattr(config.evaluate, name) for name in _SETTINGS}
    inputs = {
        **{name: hash_file(path) for name, path in files.items()},
        **settings,
        "seed": config.seed,
        "model.precision": model.precision,
        "--reference": plan.reference,
        # The walk of updates starts there, and the order of the images is cut at the largest number.
        "--images": [plan.images[0], max(plan.reference, *plan.images)],
    }
    if model.quantization != "none":
        inputs["model.quantization"] = model.quantization
    path = out / INPUTS
    try:
        out.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except OSError as error:
        raise ConfigError(f"cannot write to --out {out}: {error.strerror}") from None
    if known is None:
        write_json(path, content=inputs, allow_nan=False)
        return
    changed = [name for name in {**known, **inputs} if known.get(name) != inputs.get(name)]
    if changed:
        raise ConfigError(
            f"{out} was begun with another {changed[0]}; choose another --out, or remove the folder to begin "
            "anew"
        )
