"""The parts of a foundation in their order, each with a card that says how it was made."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prefgen.errors import DataError
from prefgen.foundation.captioned import CaptionedImages, load_captioned

log = logging.getLogger(__name__)

PARTS = ("vae", "clip", "unet", "adapter", "mllm", "judge")


def build_part(
    part: str,
    *,
    shards: Path,
    work: Path,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    start: Path | None = None,
) -> dict[str, Any]:
    """Train one part and write it into ``out`` with its card ``cards/<part>.json``.

    Args:
        part: one of :data:`PARTS`; ``unet`` and ``judge`` need ``vae``, ``unet`` needs ``clip``, and
            ``adapter`` needs ``unet``.
        shards: captioned shards (``train-*``, ``heldout-*``, ``staged-*`` for UNet and adapter,
            ``studies-*`` for the UNet, ``judge-*`` for the judge).
        work: checkpoints and caches, one folder a part.
        out: receives ``pipeline/``, ``text_adapter.safetensors``, ``mllm/``, ``judge.safetensors`` and
            ``cards/``.
        seed: of weights, batches and noise.
        steps: instead of the plan's; for CLIP those of its text tower, for the MLLM those of
            its grouping curriculum.
        start: folder of a trained UNet that the UNet begins with; for other parts None.

    Returns:
        The card.

    Raises:
        DataError: shards or an earlier part are missing.
    """
    for needed in {
        "unet": ("vae", "text_encoder"),
        "adapter": ("vae", "text_encoder", "unet"),
        "judge": ("vae",),
    }.get(part, ()):
        if not (out / "pipeline" / needed).is_dir():
            raise DataError(f"{part} needs {out / 'pipeline' / needed}; train the parts before it first")
    load = partial(load_captioned, shards, cache=work / "cache")
    data = load(split="judge" if part == "judge" else "train")
    figures = _train(part, data, load=load, work=work / part, out=out, seed=seed, steps=steps, start=start)
    card = {
        "part": part,
        "pictures": len(data),
        "shards": data.fingerprint,
        "seed": seed,
        **figures,
    }
    (out / "cards").mkdir(parents=True, exist_ok=True)
    (out / "cards" / f"{part}.json").write_text(json.dumps(card, indent=1) + "\n")
    log.info("%s: %s", part, {k: v for k, v in card.items() if isinstance(v, str | float | int)})
    return card


def _train(
    part: str,
    data: CaptionedImages,
    *,
    load: Callable[..., CaptionedImages],
    work: Path,
    out: Path,
    seed: int,
    steps: int | None,
    start: Path | None,
) -> dict[str, object]:
    # One part at a time is imported: diffusers and transformers take seconds each. And no part waits for
    # pictures that it does not look at.
    pipeline = out / "pipeline"
    if part == "vae":
        from prefgen.foundation import vae

        plan = _plan(vae.PLAN, seed, steps)
        return vae.train_vae(data, load(split="heldout"), work=work, out=pipeline / "vae", plan=plan)
    if part == "clip":
        from prefgen.foundation import clip

        both = (_plan(clip.TOWER_PLAN, seed, None), _plan(clip.PLAN, seed, steps))
        return clip.train_clip(data, load(split="heldout"), work=work, out=pipeline, plans=both)
    if part == "unet":
        from prefgen.foundation import unet

        plan, plainer = _plan(unet.PLAN, seed, steps), [load(split=split) for split in ("staged", "studies")]
        return unet.train_unet(data, *plainer, parts=pipeline, work=work, plan=plan, start=start)
    if part == "mllm":
        from prefgen.foundation import mllm

        plans = (
            _plan(mllm.TOWER_PLAN, seed, None),
            _plan(mllm.GROUPING_PLAN, seed, steps),
            _plan(mllm.SPEAKING_PLAN, seed, None),
        )
        return mllm.train_mllm(data, work=work, out=out / "mllm", plans=plans)
    if part == "adapter":
        from prefgen.foundation import adapter

        return adapter.train_adapter(
            data,
            load(split="staged"),
            parts=pipeline,
            work=work,
            latents=work.parent / "unet",
            out=out / "text_adapter.safetensors",
            plan=_plan(adapter.PLAN, seed, steps),
        )
    from prefgen.foundation import judge

    return judge.train_judge(
        data,
        load(split="heldout"),
        vae=pipeline / "vae",
        work=work,
        out=out / "judge.safetensors",
        plan=_plan(judge.PLAN, seed, steps),
    )


def _plan(plan: Any, seed: int, steps: int | None) -> Any:
    return replace(plan, seed=seed, **({} if steps is None else {"steps": steps}))
