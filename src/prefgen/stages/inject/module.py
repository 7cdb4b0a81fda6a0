"""The user adapter under the noise loss of a frozen diffusion model, and what users are worth to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prefgen.config import resolve_path
from prefgen.lineage import hash_file
from prefgen.models.diffusion import LatentMoments, TextCondition
from prefgen.models.fusion import FusionShape, PartName
from prefgen.models.ip_adapter import begin_from, read_adapter
from prefgen.models.noise import draw_noise, noise_loss
from prefgen.models.pixels import to_pil, to_pixels, to_uint8
from prefgen.models.sampling import SampleUsers, sample
from prefgen.models.text_lora import TEXT_LORA_FILE, add_text_lora, save_text_lora, switch_text_lora
from prefgen.models.user_adapter import UserAdapter, save_user_adapter
from prefgen.stages.base import StageModule
from prefgen.stages.inject.config import PARTS, InjectConfig
from prefgen.stages.inject.data import InjectBatch, InjectData
from prefgen.stages.inject.frozen import (
    buckets_of,
    check_encoded,
    load_aligner,
    load_bundle,
    warn_of_another_unet,
)
from prefgen.stages.inject.users import EmbeddingFacts, read_facts
from prefgen.stages.sharding import gathered, is_sharded

ARTEFACT = "user_adapter.safetensors"
_SAMPLE_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Noised:
    """Targets on their way to noise.

    Attributes:
        latents: (B,C,h,w) clean.
        noise: (B,C,h,w).
        noisy: (B,C,h,w) what the UNet sees.
        timesteps: (B,) int64.
        text: encoded prompts.
    """

    latents: Tensor
    noise: Tensor
    noisy: Tensor
    timesteps: Tensor
    text: TextCondition


class InjectModule(StageModule):
    """Stage inject: fusion and user cross-attention train, everything else is frozen."""

    stage: ClassVar[str] = "inject"
    shards_layers: ClassVar[bool] = False  # a rank that kept its texts calls no encoder: others would wait

    def __init__(self, config: InjectConfig) -> None:
        super().__init__(config)
        self.config = config
        facts = read_facts(config)
        self.bundle = load_bundle(config)
        self.buckets = buckets_of(config, bundle=self.bundle)
        check_encoded(config, buckets=self.buckets)
        # As submodules, so that Lightning moves them; on_save_checkpoint leaves them out.
        for name in ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder"):
            setattr(self, f"frozen_{name}", getattr(self.bundle, name))
        self.projector, self.lineage = load_aligner(config, facts=facts)
        # The initial weights depend on the seed alone, not on what drew random numbers before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.adapter = UserAdapter(self.bundle.unet, shape=self._shape(facts))
        self._given_parts: frozenset[PartName] = frozenset()
        if config.model.init_adapter is not None:
            start = read_adapter(resolve_path(config.model.init_adapter))
            self._given_parts = begin_from(self.adapter, start)
            warn_of_another_unet(start, lineage=self.lineage)
            self.lineage["init_adapter"] = hash_file(start.path)
        if config.model.text_lora_rank:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                add_text_lora(self.bundle.unet, rank=config.model.text_lora_rank)
            self.adapter.attention.follow(partial(switch_text_lora, self.bundle.unet))
        self._first_mean = self.adapter.fusion.mean.clone()
        self.adapter.attention.install()
        if config.model.gradient_checkpointing:
            self.bundle.unet.enable_gradient_checkpointing()
        self._moments: dict[str, LatentMoments] = {}
        self._texts: dict[str, TextCondition] = {}
        self._sampled_at: int | None = None

    def _shape(self, facts: EmbeddingFacts) -> FusionShape:
        aligned = self.projector.shape.text_width if self.projector is not None else 0
        widths = {"aligned": aligned, "core": facts.core_width, "image": facts.image_width}
        parts = cast(tuple[PartName, ...], tuple(self.config.model.parts))  # checked by the config
        return FusionShape(
            parts=parts,
            widths=tuple(widths[part] for part in parts),
            cross_width=self.bundle.cross_width,
        )

    def setup(self, stage: str) -> None:
        """Fix the fusion's statistics on training users, unless a checkpoint has brought them.

        Also before the validation that comes ahead of training: raw hidden states would make other tokens of
        every user than those training starts from. A checkpoint to resume from replaces them afterwards.
        """
        brought = not torch.equal(self.adapter.fusion.mean.cpu(), self._first_mean)
        if stage not in ("fit", "validate") or brought:
            return
        data = self.trainer.datamodule
        assert isinstance(data, InjectData)
        rows = data.statistics()
        parts = self._parts(sem=rows["sem"], core=rows["core"], image=rows["image"])
        self.adapter.fusion.standardise(
            {name: value for name, value in parts.items() if name not in self._given_parts}
        )
        if self._begins_in_text_space():
            self.adapter.fusion.begin_in_text_space(parts["aligned"])

    def _begins_in_text_space(self) -> bool:
        """Whether aligned embeddings lie in the space the UNet reads; SDXL's pooled text does not."""
        if self.projector is None or self.config.model.init_adapter is not None:
            return False
        same_width = self.projector.shape.text_width == self.bundle.cross_width
        return self.config.model.aligned_start == "text" and same_width

    @torch.no_grad()
    def _parts(self, *, sem: Tensor, core: Tensor, image: Tensor) -> dict[PartName, Tensor]:
        """The parts in use, float32; ``aligned`` is made of ``sem`` here."""
        parts: dict[PartName, Tensor] = {"core": core.float(), "image": image.float()}
        if self.projector is not None:
            # Outside autocast: a user's place among others is in digits that bfloat16 rounds away.
            with torch.autocast(sem.device.type, enabled=False):
                parts["aligned"] = self.projector(sem.float())
        return {name: value for name, value in parts.items() if name in self.config.model.parts}

    def training_step(self, batch: InjectBatch) -> Tensor:
        """Noise loss with drops; the users stay set until the next step, for gradient checkpointing."""
        keep = {name: batch.keep[:, index] for index, name in enumerate(PARTS)}
        # The largest of n uniform numbers is distributed as the nth root of one.
        noised = self._noised(batch, times=batch.times ** (1 / self.config.inject.timestep_draws))
        loss = self._losses(noised, users=self._tokens(batch, keep=keep)).mean()
        self.log("train/loss", loss.detach(), batch_size=len(batch.keys))
        return loss

    def validation_step(self, batch: InjectBatch) -> None:
        """On unseen users, each with its own noise and timestep, always the same ones."""
        self._measure(batch, prefix="val")

    def test_step(self, batch: InjectBatch) -> None:
        """The same on test users."""
        self._measure(batch, prefix="test")

    def _measure(self, batch: InjectBatch, *, prefix: str) -> None:
        """The loss for the own user, for the next one of the batch, and for nobody (the base model)."""
        noised, own = self._noised(batch), self._tokens(batch)
        for name, users in (("", own), ("_other", own.roll(1, dims=0)), ("_base", None)):
            if name == "_other" and len(own) == 1:
                continue  # the next user would be the own one
            loss = self._losses(noised, users=users).mean()
            self.log(f"{prefix}/loss{name}", loss, batch_size=len(batch.keys), sync_dist=True)
        self.adapter.attention.clear()

    def _tokens(self, batch: InjectBatch, *, keep: Mapping[str, Tensor] | None = None) -> Tensor:
        parts = self._parts(sem=batch.sem, core=batch.core, image=batch.image)
        kept = None if keep is None else {name: keep[name] for name in parts}
        return self.adapter.tokens(parts, keep=kept)

    def _noised(self, batch: InjectBatch, *, times: Tensor | None = None) -> Noised:
        """The targets of a batch, noised as each example's seed says, to ``times`` (B,) or its own."""
        schedule = self.bundle.schedule
        moments = self.moments(batch)
        draw = draw_noise(
            batch.noise_seeds, shape=moments.mean.shape[1:], offset=self.config.inject.noise_offset
        )
        noise = draw.noise.to(self.device)
        times = batch.times if times is None else times
        # A root may round up to 1, which is no timestep any more.
        timesteps = (times * len(schedule)).long().clamp_max(len(schedule) - 1)
        latents = self.bundle.draw_latents(moments, noise=draw.posterior_noise)
        return Noised(
            latents=latents,
            noise=noise,
            noisy=schedule.add(latents, noise=noise, timesteps=timesteps),
            timesteps=timesteps,
            text=self.text_of(batch),
        )

    def _losses(self, noised: Noised, *, users: Tensor | None) -> Tensor:
        """(B,) float32 noise losses; ``users`` (B,N,Dcross), or None for the base model."""
        if users is None:
            self.adapter.attention.clear()
        else:
            self.adapter.attention.set(users, user_scale=1.0)
        return noise_loss(
            self.bundle.denoise(noised.noisy, timesteps=noised.timesteps, text=noised.text),
            latents=noised.latents,
            noise=noised.noise,
            timesteps=noised.timesteps,
            schedule=self.bundle.schedule,
            min_snr_gamma=self.config.inject.min_snr_gamma,
        )

    # Frozen encoders, each input once

    def moments(self, batch: InjectBatch) -> LatentMoments:
        """Posterior of the targets.

        Kept ones are encoded alone: products of another batch size round differently, and a resumed run,
        whose memory is empty, would not be the run it goes on from.
        """
        if batch.moments is not None:
            return LatentMoments(mean=batch.moments[:, 0], std=batch.moments[:, 1])
        assert batch.pixels is not None
        with torch.autocast(self.device.type, enabled=False):
            if not self.config.data.cache_latents:
                return self.bundle.encode_moments(batch.pixels)
            kept = [self._moment(key, pixels) for key, pixels in zip(batch.keys, batch.pixels, strict=True)]
        return LatentMoments(mean=torch.cat([m.mean for m in kept]), std=torch.cat([m.std for m in kept]))

    def _moment(self, key: str, pixels: Tensor) -> LatentMoments:
        if key in self._moments:
            return self._moments[key]
        moments = self.bundle.encode_moments(pixels[None])
        if len(self._moments) < self.config.data.max_cached:
            self._moments[key] = moments
        return moments

    def text_of(self, batch: InjectBatch) -> TextCondition:
        """Encoded prompts of a batch, no prompt where the text is dropped."""
        if batch.hidden is None or batch.pooled is None:
            return self.texts(batch.prompts)
        dtype = self.bundle.text_encoder.dtype
        text = TextCondition(hidden=batch.hidden.to(dtype), pooled=batch.pooled.to(dtype))
        with torch.autocast(self.device.type, enabled=False):
            return _without_dropped(text, prompts=batch.prompts, nothing=self._text(""))

    def texts(self, prompts: Sequence[str]) -> TextCondition:
        """Encoded prompts, an empty one as no prompt is at generation; kept as :meth:`moments` are."""
        with torch.autocast(self.device.type, enabled=False):
            if not self.config.data.cache_text:
                return self._encode_prompts(prompts)
            return TextCondition.cat([self._text(prompt) for prompt in prompts])

    def _text(self, prompt: str) -> TextCondition:
        if prompt in self._texts:
            return self._texts[prompt]
        text = self._encode_prompts([prompt])
        if len(self._texts) < self.config.data.max_cached:
            self._texts[prompt] = text
        return text

    def _encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        text, nothing = self.bundle.encode_text(prompts), self.bundle.encode_nothing(1)
        return _without_dropped(text, prompts=prompts, nothing=nothing)

    # Pictures while training

    def on_validation_epoch_end(self) -> None:
        """Draw the grid where it is due; the moving average, if kept, is in place here."""
        every, step = self.config.inject.sample_every_n_steps, self.global_step
        writes = self.trainer.is_global_zero
        if not every or not (writes or is_sharded(self)) or (writes and self.logger is None):
            return
        if self._sampled_at is not None and step - self._sampled_at < every:
            return
        self._sampled_at = step
        batch = self.trainer.strategy.batch_to_device(next(iter(self.trainer.datamodule.val_dataloader())))
        with self.trainer.precision_plugin.forward_context(), gathered(self):
            grid = self.draw_grid(batch)
        if not writes:  # where the UNet lies in parts, all ranks draw and one keeps the picture
            return
        self.logger.experiment.add_image("samples", grid.transpose(2, 0, 1), step)
        folder = self.run_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid).save(folder / f"step-{step:08d}.png")

    @torch.no_grad()
    def draw_grid(self, batch: InjectBatch) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """(H,W,3) picture: on top a liked image of each user, below one row a prompt, base model first.

        All of a row start from the same noise.
        """
        settings = self.config.inject
        count = min(settings.num_sample_users, len(batch.keys))
        prompts = list(dict.fromkeys(p for p in batch.prompts if p))[: settings.num_sample_prompts] or [""]
        parts = self._parts(sem=batch.sem[:count], core=batch.core[:count], image=batch.image[:count])
        # The base model is a user at scale 0 in the same batch; whose parts stand there does not matter.
        row = {name: torch.cat([value[:1], value]) for name, value in parts.items()}
        columns, rows = count + 1, len(prompts)
        users = SampleUsers.of(
            self.adapter,
            parts={name: value.repeat(rows, 1) for name, value in row.items()},
            scale=([0.0] + [1.0] * count) * rows,
        )
        drawn = sample(
            self.bundle,
            [prompt for prompt in prompts for _ in range(columns)],
            seeds=[_SAMPLE_SEED + index for index in range(rows) for _ in range(columns)],
            users=users,
            num_steps=settings.sample_steps,
            guidance_scale=settings.sample_guidance,
        )
        shown = self._shown(batch, count=count)
        top = torch.cat([torch.ones_like(shown[:1]), shown]).to(drawn)
        tiles = to_uint8(torch.cat([top, drawn]))
        height, width = tiles.shape[1:3]
        grid = tiles.reshape(rows + 1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
        return grid.reshape((rows + 1) * height, columns * width, 3)

    def _shown(self, batch: InjectBatch, *, count: int) -> Tensor:
        """(count,3,H,W) the first targets, at the size that is drawn."""
        pixels = batch.pixels
        if pixels is None:
            moments = self.moments(batch)
            latents = self.bundle.draw_latents(moments, noise=torch.zeros_like(moments.mean))
            pixels = self.bundle.decode_latents(latents[:count])
        if pixels.shape[-2:] == self.bundle.image_size:
            return pixels[:count]
        return to_pixels(to_pil(pixels[:count]), size=self.bundle.image_size)

    # Artefact

    def export(self, run_dir: Path) -> Path:
        """Write ``user_adapter.safetensors``: trained parts and fixed statistics, with their lineage."""
        path = run_dir / ARTEFACT
        save_user_adapter(self.adapter, path=path, lineage=self.lineage)
        if self.config.model.text_lora_rank:
            save_text_lora(self.bundle.unet, path=run_dir / TEXT_LORA_FILE)
        return path


def _without_dropped(text: TextCondition, *, prompts: Sequence[str], nothing: TextCondition) -> TextCondition:
    empty = torch.tensor([not prompt for prompt in prompts], device=text.hidden.device)
    return TextCondition(
        hidden=torch.where(empty[:, None, None], nothing.hidden, text.hidden),
        pooled=torch.where(empty[:, None], nothing.pooled, text.pooled),
    )
