"""The conditional UNet over frozen latents and text: v-prediction, zero terminal SNR, text drops for CFG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from prefgen.errors import DataError
from prefgen.foundation.captioned import EMPTY_RATE, CaptionedImages
from prefgen.foundation.loop import Loop, LoopPlan, quick
from prefgen.foundation.vae import pixels
from prefgen.lineage import hash_file
from prefgen.models.noise import NoiseSchedule, draw_timesteps, noise_loss
from prefgen.whole_file import whole_file, write_json

STAGED_RATES, STUDY_RATES = (0.3, 0.35), (0.6, 0.15)
"""Shares of drawings in the middle of a scene, and of plain ones, in a batch: at the first step and, changing
evenly, at the last; a UNet that is trained on begins half way. Without plain ones every caption of a subject
ended in a blob after 4,000 steps, whereas backgrounds, frames and palettes stood. Without staged ones a
subject known when plain was a smudge before a hill: each hides behind 12 compositions and 12 renderings."""

FEWEST = 3
"""Attributes at least in the caption of a decorated drawing, so that little of where and how large its
subject stands is left to chance."""

BARE_STUDY_RATE = 0.5
"""Share of plain drawings captioned by their subject alone; no decorated one is. A name that might come with
any frame, background and number of copies was drawn with one of them always, the subject small or cut off."""

PLAN = LoopPlan(
    batch_size=32, steps=5_000, learning_rate=1.5e-3, warmup=100, weight_decay=0.01, ema=0.998, every=250
)
"""For a CPU without bf16 products, where 5,000 steps take an hour and a half. After 200 steps of 32 the loss
stood at .317 by Muon and at .353 by AdamW, for a quarter more time a step; steps of 64 took twice as long and
learned no more."""


def build_scheduler() -> DDIMScheduler:
    """Zero terminal SNR: without it the base cannot draw a black or a white page (arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def build_unet(*, sample_size: int, cross_width: int) -> UNet2DConditionModel:
    """Attention at 8 x 8 and 4 x 4, with four heads (diffusers calls their number attention_head_dim).

    The text also joins the timestep in every residual block, as in DeepFloyd IF: by cross-attention alone a
    subject's name still ended in a blob for most subjects after 3,700 steps.
    """
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_width,
        attention_head_dim=4,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def latents_of(data: CaptionedImages, *, vae: AutoencoderKL, work: Path) -> Tensor:
    """Mean latents of all pictures in the UNet's scale, float16 (N, 4, h, w); kept in ``work``."""
    cache = work / f"latents-{data.fingerprint}.pt"
    if not cache.exists():
        encoded = _encode_all(vae, data)
        with whole_file(cache) as part:
            torch.save(encoded, part)
    latents: Tensor = torch.load(cache, weights_only=True)
    return latents


def _encode_all(vae: AutoencoderKL, data: CaptionedImages) -> Tensor:
    parts = []
    for start in tqdm(range(0, len(data), 256), unit="batch", desc="encoding latents"):
        with torch.no_grad(), quick():
            latents = vae.encode(pixels(data.images[start : start + 256])).latent_dist.mode()
        parts.append((latents.float() * vae.config.scaling_factor).half())
    return torch.cat(parts)


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    *,
    schedule: NoiseSchedule,
    generator: torch.Generator,
) -> Tensor:
    """Mean noise loss of a batch of clean latents (B,4,h,w) at noisy timesteps.

    Args:
        predict: the UNet's prediction for noisy latents (B,4,h,w) and timesteps (B,).
        clean: latents in the UNet's scale.
        schedule: the pipeline's.
        generator: draws noise, then timesteps.
    """
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = _noisy_timesteps(len(clean), total=len(schedule), generator=generator)
    # math attention: on a CPU the fused kernel's backward takes several times as long at these sizes
    with quick(), sdpa_kernel(SDPBackend.MATH):
        predicted = predict(schedule.add(clean, noise=noise, timesteps=timesteps), timesteps)
    return noise_loss(predicted, latents=clean, noise=noise, timesteps=timesteps, schedule=schedule).mean()


def train_unet(
    data: CaptionedImages,
    staged: CaptionedImages,
    studies: CaptionedImages,
    *,
    parts: Path,
    work: Path,
    plan: LoopPlan = PLAN,
    start: Path | None = None,
) -> dict[str, object]:
    """Train over the VAE and text encoder in ``parts`` and complete the pipeline folder there.

    Args:
        data: captioned pictures.
        staged: the same subjects in the middle of any scene, :data:`STAGED_RATES` of every batch.
        studies: plain pictures of them, :data:`STUDY_RATES` of every batch.
        parts: folder with ``vae``, ``tokenizer``, ``text_encoder``, ``image_encoder``,
            ``feature_extractor``; receives ``unet``, ``scheduler`` and ``model_index.json``.
        work: checkpoints and the latents' cache.
        plan: length and rate.
        start: folder of a trained UNet to begin with, such as the shipped one; None begins anew.

    Returns:
        Figures for the card.

    Raises:
        DataError: no UNet at ``start``, or one of another build.
    """
    torch.manual_seed(plan.seed)
    vae = AutoencoderKL.from_pretrained(parts / "vae", torch_dtype=torch.float32).eval()
    text_encoder = CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32).eval()
    text_encoder.requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    sources = [
        _Source(pictures, latents_of(pictures, vae=vae, work=work), bare_rate=bare_rate, fewest=fewest)
        for pictures, bare_rate, fewest in (
            (data, 0.0, FEWEST),
            (staged, 0.0, FEWEST),
            (studies, BARE_STUDY_RATE, 1),
        )
    ]
    unet = build_unet(sample_size=sources[0].latents.shape[-1], cross_width=text_encoder.config.hidden_size)
    if start is not None:
        _begin_with(unet, start=start)
    unet.to(memory_format=torch.channels_last)  # a tenth less time a step
    scheduler = build_scheduler()
    schedule = NoiseSchedule.of(scheduler)
    loop = Loop(unet, plan=plan, folder=work, matrices=_inner_matrices(unet))

    def encode(captions: list[str]) -> Tensor:
        ids = tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )["input_ids"]
        with torch.no_grad():
            hidden: Tensor = text_encoder(ids).last_hidden_state
        return hidden

    def loss(step: int, rng: np.random.Generator, generator: torch.Generator) -> dict[str, Tensor]:
        done = step / plan.steps if start is None else 0.5 + 0.5 * step / plan.steps
        centered, plain = (
            round((first + (last - first) * done) * plan.batch_size)
            for first, last in (STAGED_RATES, STUDY_RATES)
        )
        counts = (plan.batch_size - centered - plain, centered, plain)
        drawn = [source.draw(count, rng=rng) for source, count in zip(sources, counts, strict=True)]
        clean = torch.cat([latents for latents, _ in drawn])
        captions = [caption for _, some in drawn for caption in some]

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            predicted: Tensor = unet(noisy, timesteps, encode(captions), return_dict=False)[0]
            return predicted

        return {"loss": denoising_loss(predict, clean, schedule=schedule, generator=generator)}

    loop.run(loss, title="unet")
    loop.use_average()
    unet.eval().half().save_pretrained(parts / "unet")
    scheduler.save_pretrained(parts / "scheduler")
    write_model_index(parts)
    return {
        "gate": "an independent classifier of 32 evaluation subjects names at least half the pictures right",
        "staged": len(staged),
        "studies": len(studies),
        "started_from": None if start is None else hash_file(start / SAFETENSORS_WEIGHTS_NAME),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "history": loop.history,
    }


@dataclass(frozen=True)
class _Source:
    """Pictures of one kind, and how they are captioned; see :meth:`CaptionedImages.caption`."""

    pictures: CaptionedImages
    latents: Tensor
    bare_rate: float
    fewest: int

    def draw(self, count: int, *, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        rows = rng.integers(len(self.pictures), size=count)
        captions = [
            ""
            if rng.random() < EMPTY_RATE
            else self.pictures.caption(int(i), rng=rng, subject_rate=self.bare_rate, fewest=self.fewest)
            for i in rows
        ]
        return self.latents[torch.from_numpy(rows)].float(), captions


def _begin_with(unet: UNet2DConditionModel, *, start: Path) -> None:
    try:
        unet.load_state_dict(load_file(start / SAFETENSORS_WEIGHTS_NAME))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"cannot start from {start}: {str(error).splitlines()[0][:200]}") from None


def _inner_matrices(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """What Muon trains: all but the ways in and out, of latents, time and text, and the vectors."""
    outer = ("conv_in.", "conv_out.", "time_embedding.", "add_embedding.")
    return [p for name, p in unet.named_parameters() if p.ndim >= 2 and not name.startswith(outer)]


def _noisy_timesteps(batch_size: int, *, total: int, generator: torch.Generator) -> Tensor:
    """The later of two uniform draws each: what a picture shows is settled in the noisy half.

    After 2,500 steps of uniform draws a wrong subject in the caption cost .037 of the loss at the last
    timestep, .007 in the middle and .002 below 300, while backgrounds and frames were drawn well already.
    """
    first, second = (
        draw_timesteps(batch_size, num_train_timesteps=total, generator=generator) for _ in range(2)
    )
    return torch.maximum(first, second)


def write_model_index(parts: Path) -> None:
    """The file by which diffusers knows the folder for a stock StableDiffusionPipeline."""
    import diffusers

    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": ["transformers", "CLIPImageProcessorPil"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(parts / "model_index.json", content=index, indent=2)
