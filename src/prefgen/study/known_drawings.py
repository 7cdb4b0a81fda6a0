"""What the judge reads on known drawings, kept for the next evaluation of the same ones.

Restoring the drawings takes minutes on a CPU. The file is named by everything that the readings follow from,
so that figures are the same whether it was there or not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prefgen.config import resolve_path
from prefgen.data.index import index_hash
from prefgen.evaluate.judges import Judge
from prefgen.lineage import hash_file, hash_folder, hash_json
from prefgen.study.config import EvaluateConfig
from prefgen.study.drawing import Studio
from prefgen.study.judged import measure_judge
from prefgen.study.users import StudyUser
from prefgen.whole_file import write_json

logger = logging.getLogger(__name__)

_VERSION = 1
"""Of what :func:`measure_judge` finds; another one measures anew."""

_SETTINGS = ("max_judged_images", "minimum_accuracy", "batch_size")


def read_known_drawings(
    config: EvaluateConfig,
    *,
    judge: Judge,
    users: Sequence[StudyUser],
    studio: Studio,
    pool: Sequence[str],
) -> dict[str, Any]:
    """:func:`measure_judge` as the configuration says, or what it found in an earlier evaluation.

    Args:
        config: with its ``auto`` settled.
        judge: of ``model.judge``.
        users: the evaluation's.
        studio: of ``model.pipeline``.
        pool: subjects of the test users that the judge can name.
    """
    made_from = _made_from(config, users=users, studio=studio)
    path = None
    if made_from is not None and config.data.feature_cache:
        path = Path(config.data.feature_cache) / f"judge-{hash_json(made_from)[:16]}.json"
    found = _kept(path, made_from=made_from)
    if found is not None:
        logger.info("evaluate: what the judge reads on known drawings is taken from %s", path)
        return found
    settings = config.evaluate
    total = min(settings.max_judged_images, sum(len(user.images) for user in users))
    with tqdm(total=total, unit="image", desc="restoring", dynamic_ncols=True) as bar:
        found = measure_judge(
            judge,
            users=users,
            studio=studio,
            pool=pool,
            minimum=settings.minimum_accuracy,
            max_images=settings.max_judged_images,
            seed=config.seed,
            batch_size=settings.batch_size,
            progress=bar.update,
        )
    _keep(path, found=found, made_from=made_from)
    return found


def _made_from(
    config: EvaluateConfig, *, users: Sequence[StudyUser], studio: Studio
) -> dict[str, Any] | None:
    """Everything that the readings follow from, last bits included; None for a VAE that is nowhere here."""
    vae = resolve_path(config.model.pipeline) / "vae"
    if not any(vae.glob("*.safetensors")):
        return None
    return {
        "version": _VERSION,
        "judge": hash_file(resolve_path(config.model.judge)),
        "vae": [hash_folder(vae), hash_file(vae / "config.json")],
        "shards": index_hash(resolve_path(config.data.shards)),
        "users": hash_json([user.user_id for user in users]),
        "image_size": list(studio.bundle.image_size),
        "seed": config.seed,
        **{name: getattr(config.evaluate, name) for name in _SETTINGS},
        "device": config.model.device,
        "memory_format": config.model.memory_format,
        "torch": [torch.__version__, torch.get_num_threads()],
    }


def _kept(path: Path | None, *, made_from: dict[str, Any] | None) -> dict[str, Any] | None:
    if path is None or not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, Any] | None = record["found"] if record["made_from"] == made_from else None
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s is damaged; the judge is measured again", path)
        return None
    return found


def _keep(path: Path | None, *, found: dict[str, Any], made_from: dict[str, Any] | None) -> None:
    if path is None:
        return
    try:
        write_json(path, content={"made_from": made_from, "found": found}, shared=True)
    except OSError as error:
        logger.warning(
            "cannot keep %s (%s); the next evaluation measures the judge again", path, error.strerror
        )
