"""Every configs/*/*.yaml on paper: does it load, what would train, what is held, what is written.

    python tools/preset_table.py
    python tools/preset_table.py --preset sdxl paper

A file is loaded as 'prefgen fit --dry-run --config FILE' (or 'prefgen evaluate --dry-run') loads it. Networks
are built on torch's meta device, published ones from their published configurations and others from their
folders, so no weight is read. "trained" are numbers that get gradients, "frozen" those that are held beside
them. Memory is what one GPU holds of both: weights, and for what is trained gradients, AdamW's two means and
the moving average; activations come on top and depend on batch, image size and checkpointing. The artefact of
stage probe is what predict writes for one user of 40 images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from prefgen.config import PRESETS, StageConfig, configs_folder, load_config, resolve_path, to_yaml
from prefgen.errors import PrefgenError
from prefgen.foundation.unet import build_unet
from prefgen.models.fusion import FusionShape
from prefgen.models.mllm import MLLM
from prefgen.models.pooling import POOLINGS
from prefgen.models.probes import NUM_SEM_LAYERS
from prefgen.models.projector import ProjectorShape, SemProjector
from prefgen.models.real_sizes import PublishedModel, build_on_meta, measure, published_models
from prefgen.models.user_adapter import UserAdapter
from prefgen.stages import STAGES
from prefgen.stages.align.config import AlignConfig
from prefgen.stages.inject.config import InjectConfig
from prefgen.stages.probe.config import ProbeConfig
from prefgen.stages.vqa.config import VQAConfig
from prefgen.study.config import EvaluateConfig, load_evaluate_config
from prefgen.testing.published import SD15, SDXL, image_encoder_on_meta, meta_parts

PUBLISHED = {"stable-diffusion-v1-5": SD15, "stable-diffusion-xl-base-1.0": SDXL}
"""Name of a pipeline's folder -> its published configurations."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits, its quantized scale included."""

TRAINED = 4 + 4 + 8
"""Bytes a trained number takes: float32 weight, gradient, two means."""

USER_IMAGES = 40


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; numbers of parameters and bytes, None where there are none."""

    name: str
    state: str
    precision: str = "-"
    trained: int | None = None
    frozen: int | None = None
    memory: float | None = None
    artefact: float | None = None

    def __str__(self) -> str:
        numbers = [f"{n / 1e6:,.1f} M" if n is not None else "-" for n in (self.trained, self.frozen)]
        sizes = [size(n) if n is not None else "-" for n in (self.memory, self.artefact)]
        cells = "".join(f"{text:>13}" for text in (*numbers, *sizes))
        return f"{self.name:<30}{self.state:<10}{self.precision:<11}{cells}"


def size(number: float) -> str:
    """Bytes in words."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"


def count(module: Any) -> int:
    """Its parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, kw_only=True)
class Base:
    """A diffusion pipeline without memory.

    Attributes:
        parts: UNet, VAE and text encoders by name.
        text_widths: width of each text encoder's pooled vector.
        cross_width: of the cross-attentions.
        image_encoder: the one its adapters read.
    """

    parts: dict[str, torch.nn.Module]
    text_widths: dict[str, int]
    cross_width: int
    image_encoder: torch.nn.Module

    @property
    def image_width(self) -> int:
        """Of image embeddings."""
        return int(self.image_encoder.config.projection_dim)


@cache
def base_of(path: str) -> Base:
    """A published pipeline by its folder's name, or one at hand by its configurations."""
    published = PUBLISHED.get(Path(path).name)
    if published is not None:
        names = ("text_encoder", "text_encoder_2")
        keys = ("hidden_size", "projection_dim")
        return Base(
            parts=meta_parts(published),
            text_widths={
                name: int(text[key]) for name, key, text in zip(names, keys, published.texts, strict=False)
            },
            cross_width=int(published.unet["cross_attention_dim"]),
            image_encoder=image_encoder_on_meta(published),
        )
    folder = resolve_path(path)
    text = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        if (folder / "unet" / "config.json").is_file():
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        else:  # the mini UNet, where it is not trained yet
            unet = build_unet(sample_size=16, cross_width=text.hidden_size)
        vision = CLIPVisionConfig.from_pretrained(folder / "image_encoder")
        parts = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}
        encoder = CLIPVisionModelWithProjection(vision)
    return Base(
        parts=parts,
        text_widths={"text_encoder": int(text.hidden_size)},
        cross_width=int(unet.config.cross_attention_dim),
        image_encoder=encoder,
    )


@cache
def described(path: str) -> PublishedModel | None:
    """A published MLLM by its hub id, or one at hand by its config.json; None for one that is not there."""
    known = {model.name: model for model in published_models()}
    if path in known:
        return known[path]
    file = resolve_path(path) / "config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    return PublishedModel(
        name=path, family=config["model_type"], parameters=None, count_source="", config=config
    )


@cache
def mllm_of(path: str) -> MLLM | None:
    """The same, built."""
    found = described(path)
    return None if found is None else build_on_meta(found)


def mllm_memory(mllm: MLLM, *, dtype: str, quantization: str) -> float:
    """Bytes of its weights; nf4 takes the language model's linear layers."""
    total = count(mllm.model)
    if quantization == "none":
        return total * BYTES[dtype]
    linear = sum(
        module.weight.numel()
        for layer in mllm.text_model.layers
        for module in layer.modules()
        if isinstance(module, torch.nn.Linear)
    )
    return linear * NF4 + (total - linear) * BYTES[dtype]


def settled(dtype: str) -> str:
    """``auto`` counted as the larger one."""
    return "float32" if dtype == "auto" else dtype


@cache
def lora_parameters(path: str, *, rank: int, targets: tuple[str, ...]) -> int:
    """Parameters of a LoRA on a model of its own: it stays in it."""
    found = described(path)
    assert found is not None
    return measure(found, rank=rank, targets=targets).trainable


def vqa_numbers(config: VQAConfig) -> dict[str, Any]:
    """LoRA on the MLLM."""
    model, mllm = config.model, mllm_of(config.model.mllm)
    if mllm is None:
        return {}
    trained = lora_parameters(model.mllm, rank=model.lora_rank, targets=tuple(model.lora_targets))
    held = mllm_memory(mllm, dtype=settled(model.frozen_dtype), quantization=model.quantization)
    return {
        "trained": trained,
        "frozen": count(mllm.model),
        "memory": held + trained * TRAINED,
        "artefact": 4 * trained,
    }


def probe_numbers(config: ProbeConfig, *, base: Base) -> dict[str, Any]:
    """Linear probes of every layer and pooling, each with its control, and what predict writes."""
    model, mllm = config.model, mllm_of(config.model.mllm)
    if mllm is None:
        return {}
    cells, width = mllm.num_layers * len(POOLINGS), mllm.hidden_size
    trained = sum(2 * cells * classes * (width + 1) for classes in (config.data.inter_users, 2))
    encoder = count(base.image_encoder)
    held = mllm_memory(mllm, dtype=settled(model.frozen_dtype), quantization=model.quantization)
    draw = 2 * (1 + NUM_SEM_LAYERS) * width  # core and sem, and their negative twins
    return {
        "trained": trained,
        "frozen": count(mllm.model) + encoder,
        "memory": held + encoder * BYTES["float32"] + trained * TRAINED,
        "artefact": 4 * (config.embed.num_draws * draw + USER_IMAGES * base.image_width),
    }


def align_numbers(config: AlignConfig, *, base: Base, width: int | None) -> dict[str, Any]:
    """The projector, and the text encoder it is trained against."""
    if width is None:
        return {}
    which = config.model.text_encoder
    shape = ProjectorShape(
        sem_width=NUM_SEM_LAYERS * width,
        text_width=base.text_widths[which],
        hidden_width=config.model.hidden_width,
    )
    with torch.device("meta"):
        trained = count(SemProjector(shape))
    frozen = count(base.parts[which])
    memory = trained * TRAINED + frozen * BYTES[settled(config.model.frozen_dtype)]
    return {"trained": trained, "frozen": frozen, "memory": memory, "artefact": 4 * trained}


def inject_numbers(config: InjectConfig, *, base: Base, width: int | None) -> dict[str, Any]:
    """The adapter, and the pipeline it is trained in."""
    if width is None:
        return {}
    # SDXL's pooled text comes from the second encoder, and aligned embeddings with it.
    widths = {"aligned": [*base.text_widths.values()][-1], "core": width, "image": base.image_width}
    names: Any = tuple(config.model.parts)
    shape = FusionShape(
        parts=names, widths=tuple(widths[part] for part in names), cross_width=base.cross_width
    )
    with torch.device("meta"):
        trained = count(UserAdapter(base.parts["unet"], shape=shape))
    frozen = {part: count(module) for part, module in base.parts.items()}
    ema = 4 if config.optim.ema_decay is not None else 0
    vae = frozen.pop("vae")
    memory = trained * (TRAINED + ema) + vae * BYTES[settled(config.model.vae_dtype)]
    memory += sum(frozen.values()) * BYTES[settled(config.model.frozen_dtype)]
    return {
        "trained": trained,
        "frozen": vae + sum(frozen.values()),
        "memory": memory,
        "artefact": 4 * trained,
    }


def evaluate_numbers(config: EvaluateConfig, *, base: Base) -> dict[str, Any]:
    """Nothing trains; MLLM and pipeline come one after the other, so the larger one decides."""
    mllm = mllm_of(config.model.mllm)
    if mllm is None:
        return {}
    half = config.model.device != "cpu" and config.model.precision != "float32"
    unet = count(base.parts["unet"])
    others = sum(count(module) for name, module in base.parts.items() if name != "unet")
    encoder = count(base.image_encoder)
    drawing = unet * (2 if half else 4) + (others + encoder) * 4
    asking = count(mllm.model) * (2 if half else 4)
    return {"frozen": count(mllm.model) + unet + others + encoder, "memory": max(drawing, asking)}


def rows(preset: str) -> Iterator[Row]:
    """A row a file of the preset."""
    folder = configs_folder() / preset
    loaded = {path: dry_run(path) for path in sorted(folder.glob("*.yaml"))}
    probe = loaded.get(folder / "probe.yaml")
    mllm = mllm_of(probe.model.mllm) if isinstance(probe, ProbeConfig) else None
    pipelines = [config.model.pipeline for config in loaded.values() if hasattr(config, "model")
                 and hasattr(config.model, "pipeline")]  # fmt: skip
    # Stage probe names no pipeline; its image encoder is that of the preset's.
    pipeline = pipelines[0] if pipelines else "asset:mini/pipeline"
    for path, config in loaded.items():
        name = f"{preset}/{path.name}"
        if isinstance(config, str):
            yield Row(name=name, state=config)
            continue
        width = None if mllm is None else mllm.hidden_size
        numbers = numbers_of(config, pipeline=pipeline, width=width)
        precision = config.model.precision if isinstance(config, EvaluateConfig) else config.trainer.precision
        yield Row(name=name, state="loads" if numbers else "no MLLM", precision=precision, **numbers)


def numbers_of(config: Any, *, pipeline: str, width: int | None) -> dict[str, Any]:
    """What a configuration would train, hold and write; nothing where its MLLM is not there."""
    if isinstance(config, VQAConfig):
        return vqa_numbers(config)
    if isinstance(config, ProbeConfig):
        return probe_numbers(config, base=base_of(pipeline))
    if isinstance(config, AlignConfig):
        return align_numbers(config, base=base_of(config.model.pipeline), width=width)
    if isinstance(config, InjectConfig):
        return inject_numbers(config, base=base_of(config.model.pipeline), width=width)
    return evaluate_numbers(config, base=base_of(config.model.pipeline))


def dry_run(path: Path) -> StageConfig | EvaluateConfig | str:
    """The configuration, or in words why there is none."""
    stage = next((name for name in STAGES if path.stem.startswith(name)), None)
    try:
        if path.stem == "evaluate":
            return load_evaluate_config(file=path)
        if stage is None:
            return "no stage"
        config = load_config(stage, file=path)
        to_yaml(config)
        return config
    except PrefgenError as error:
        return f"REFUSED: {error}"


def main() -> None:
    """Read the command line and print."""
    text = __doc__ or ""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, nargs="+", default=PRESETS)
    args = parser.parse_args()
    head = "".join(f"{word:>13}" for word in ("trained", "frozen", "memory", "artefact"))
    print(f"{'file':<30}{'':<10}{'precision':<11}{head}")
    for preset in args.preset:
        for row in rows(preset):
            print(row, flush=True)


if __name__ == "__main__":
    main()
