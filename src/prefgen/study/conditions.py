"""Which conditions an evaluation draws, and with which models, as its configuration says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from prefgen.config import resolve_path
from prefgen.data.embeddings import EmbeddingReader
from prefgen.evaluate.judges import Judge
from prefgen.models.user_adapter import UserAdapter
from prefgen.study.asking import mllm_form
from prefgen.study.baselines import EXTRA_MEANINGS, Rivals, draw_rivals
from prefgen.study.config import EvaluateConfig
from prefgen.study.drawing import MEANINGS, DrawSettings, Studio, draw_all
from prefgen.study.kept_drawings import KeptDrawings
from prefgen.study.users import StudyUser

ADAPTER = "user_adapter.safetensors"


def in_order(names: Iterable[str]) -> list[str]:
    """Conditions in the order of the reports; json has lost it."""
    order = [*(name for name in MEANINGS if name != "real"), *EXTRA_MEANINGS, "real"]
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def meanings(config: EvaluateConfig) -> dict[str, str]:
    """Condition -> what it is, the extra ones before the real drawings."""
    known = MEANINGS | {name: EXTRA_MEANINGS[name] for name in config.extra.conditions}
    return {name: known[name] for name in in_order(known)}


def open_studio(config: EvaluateConfig, *, kept: KeptDrawings | None = None) -> Studio:
    """Pipeline and projector, and where the base model's pictures are kept, if they are."""
    model = config.model
    pipeline = resolve_path(model.pipeline)
    local = model.pipeline.startswith("asset:") or pipeline.exists()
    return Studio(
        pipeline=str(pipeline) if local else model.pipeline,
        projector=resolve_path(model.align) / "projector.safetensors",
        header=EmbeddingReader(resolve_path(config.data.embeddings), split="test").header,
        unet_dtype=torch.bfloat16 if model.precision == "bfloat16" else torch.float32,
        memory_format=model.memory_format,
        image_encoder=None if model.image_encoder is None else str(resolve_path(model.image_encoder)),
        device=model.device,
        kept=kept,
    )


def open_adapters(config: EvaluateConfig, *, studio: Studio) -> dict[str, UserAdapter]:
    """``own`` and, unless it is left out, ``image_only``."""
    model = config.model
    adapters = {"own": studio.load_adapter(resolve_path(model.inject) / ADAPTER)}
    if model.inject_image_only:
        adapters["image_only"] = studio.load_adapter(resolve_path(model.inject_image_only) / ADAPTER)
    return adapters


def draw_conditions(
    config: EvaluateConfig,
    *,
    studio: Studio,
    users: Sequence[StudyUser],
    judge: Judge,
    adapters: Mapping[str, UserAdapter],
) -> dict[str, Tensor]:
    """The plain conditions; see :func:`draw_all`."""
    worded = all(user.history.liked_attributes for user in users)
    conditions = 3 + ("image_only" in adapters) + worded
    total = conditions * len(users) * config.evaluate.num_prompts
    with tqdm(total=total, unit="image", desc="drawing") as bar:
        return draw_all(
            studio,
            users,
            adapters=adapters,
            groups=judge.groups,
            settings=draw_settings(config),
            seed=config.seed,
            progress=bar.update,
        )


def draw_settings(config: EvaluateConfig) -> DrawSettings:
    """How an evaluation draws."""
    settings = config.evaluate
    return DrawSettings(
        num_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        user_scale=settings.user_scale,
        batch_size=settings.batch_size,
    )


def draw_extra(
    config: EvaluateConfig,
    *,
    studio: Studio,
    users: Sequence[StudyUser],
    adapters: Mapping[str, UserAdapter],
    timed: Callable[[str], contextlib.AbstractContextManager[None]],
) -> Rivals:
    """The extra conditions; nothing at all where none is asked for."""
    extra = config.extra
    if not extra.conditions:
        return Rivals()
    total = len(set(extra.conditions)) * len(users) * config.evaluate.num_prompts
    total += len(users) * extra.inversion_steps * ("inversion" in extra.conditions)
    with tqdm(total=total, unit="image", desc="rivals") as bar:
        return draw_rivals(
            studio,
            users,
            extra=extra,
            image_only=adapters.get("image_only"),
            mllm=config.model.mllm,
            lora=resolve_path(config.model.lora),
            form=mllm_form(config.model),
            settings=draw_settings(config),
            seed=config.seed,
            timed=timed,
            progress=bar.update,
        )
