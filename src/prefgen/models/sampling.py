"""Drawing images with a frozen bundle, with or without users.

The loop does what the stock StableDiffusionPipeline does, step for step, so that ``user_scale=0`` gives its
images bit for bit. Each image's noise comes from its own seed, whatever batch it is drawn in.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefgen.errors import DataError
from prefgen.models.diffusion import DiffusionBundle, TextCondition
from prefgen.models.fusion import PartName
from prefgen.models.user_adapter import UserAdapter
from prefgen.models.user_attention import UserAttention
from prefgen.models.user_schedule import CONSTANT, UserSchedule


@dataclass(frozen=True, kw_only=True)
class SampleUsers:
    """For whom to draw.

    Attributes:
        attention: the user attention installed in the bundle's UNet.
        embeds: (B,N,Dcross) ``user_embeds`` of each image.
        null_embeds: (1,N,Dcross) or (B,N,Dcross) tokens of the unconditional branch: those of a user of whom
            nothing is known (zeroed inputs of the fusion, never zeroed tokens), or of the disliked side.
        scale: (B,) ``user_scale`` of each image, or one number for all.
        null_scale: ``negative_user_scale``, where ``null_embeds`` are the disliked side's; None takes
            ``scale``.
        schedule: factor on both scales, step by step.
        block_scales: factor on both, by block of the UNet; None is 1 everywhere.
    """

    attention: UserAttention
    embeds: Tensor
    null_embeds: Tensor
    scale: float | Sequence[float] = 1.0
    null_scale: float | None = None
    schedule: UserSchedule = CONSTANT
    block_scales: Mapping[str, float] | None = None

    @staticmethod
    @torch.no_grad()
    def of(
        adapter: UserAdapter,
        *,
        parts: Mapping[PartName, Tensor],
        scale: float | Sequence[float] = 1.0,
        negative_parts: Mapping[PartName, Tensor] | None = None,
        negative_scale: float = 0.0,
    ) -> SampleUsers:
        """Users by their parts (B,D), with the tokens of an unknown user for the unconditional branch.

        Both kinds of tokens are computed in one batch, laid out as a stock pipeline lays them out, so that
        the images of an exported adapter agree to the last bit.

        Args:
            adapter: fusion and attention.
            parts: what the users like.
            scale: ``user_scale``.
            negative_parts: the negative twins' parts; read only where ``negative_scale`` is not 0.
            negative_scale: ``negative_user_scale``: the unconditional branch then takes the twins' tokens at
                this strength, and guidance leads away from them. At 0 it keeps those of the unknown user, at
                ``scale``.
        """
        negative = negative_parts if negative_scale else None
        return SampleUsers.of_rows(
            adapter,
            rows=adapter.fusion.rows(parts),
            scale=scale,
            negative_rows=None if negative is None else adapter.fusion.rows(negative),
            negative_scale=negative_scale,
        )

    @staticmethod
    @torch.no_grad()
    def of_rows(
        adapter: UserAdapter,
        *,
        rows: Tensor,
        scale: float | Sequence[float] = 1.0,
        negative_rows: Tensor | None = None,
        negative_scale: float = 0.0,
    ) -> SampleUsers:
        """:meth:`of` for rows (B,P,D) of ``UserFusion.rows``: users of whom different parts are known."""
        negative = negative_rows if negative_scale else None
        without = torch.zeros_like(rows) if negative is None else negative
        null_embeds, embeds = adapter.fusion(torch.cat([without, rows])).chunk(2)
        return SampleUsers(
            attention=adapter.attention,
            embeds=embeds,
            null_embeds=null_embeds,
            scale=scale,
            null_scale=None if negative is None else negative_scale,
        )

    def part(self, rows: slice) -> SampleUsers:
        """The users of some of the images."""
        shared = len(self.null_embeds) == 1
        return replace(
            self,
            embeds=self.embeds[rows],
            null_embeds=self.null_embeds if shared else self.null_embeds[rows],
            scale=self.scale if isinstance(self.scale, int | float) else list(self.scale)[rows],
        )

    def activate(self, *, guided: bool) -> None:
        """Set the users for a batch of B images, or of 2B rows where classifier-free guidance doubles it."""
        count = len(self.embeds)
        scale = torch.as_tensor(self.scale, dtype=torch.float32).expand(count)
        embeds = self.embeds
        if guided:
            embeds = torch.cat([self.null_embeds.expand(count, -1, -1), embeds])
            without = scale if self.null_scale is None else torch.full((count,), float(self.null_scale))
            scale = torch.cat([without, scale])
        self.attention.set(embeds, user_scale=scale, block_scales=self.block_scales)


def noise_for(seeds: Sequence[int], *, bundle: DiffusionBundle) -> Tensor:
    """Starting noise (B,C,h,w) float32, each image's from a CPU generator with its own seed."""
    rows = [torch.randn(*bundle.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows)


@torch.no_grad()
def sample(
    bundle: DiffusionBundle,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    noise: Tensor | None = None,
    users: SampleUsers | None = None,
    num_steps: int = 25,
    guidance_scale: float = 5.0,
    negative_prompts: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Draw one image per prompt.

    Args:
        bundle: the frozen pipeline.
        prompts: B prompts.
        seeds: B seeds: of the starting noise, and of the steps' noise where the scheduler draws any.
        noise: (B,C,h,w) starting noise to use instead of the seeds'.
        users: for whom; None draws with the base model.
        num_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 or less switches it off.
        negative_prompts: B texts of the unconditional branch; None means none.
        batch_size: images per pass; None takes all at once.

    Returns:
        pixels (B,3,H,W) float32, about [-1,1], not clamped; see ``pixels.to_pil``.

    Raises:
        DataError: the numbers of prompts, seeds, noise or users differ, a prompt is too long, or there are
            more steps than the model has timesteps.
    """
    if not 1 <= num_steps <= len(bundle.schedule):
        raise DataError(f"num_steps must be from 1 to {len(bundle.schedule)}, got {num_steps}")
    noise = noise_for(seeds, bundle=bundle) if noise is None else noise
    counts = {"prompts": len(prompts), "seeds": len(seeds), "noise": len(noise)}
    if negative_prompts is not None:
        counts["negative prompts"] = len(negative_prompts)
    if users is not None:
        counts["users"] = len(users.embeds)
    if len(set(counts.values())) != 1:
        raise DataError(f"one of each per image is needed, got {counts}")
    step = batch_size or max(1, len(prompts))
    images = []
    for start in range(0, len(prompts), step):
        rows = slice(start, start + step)
        part = None if users is None else users.part(rows)
        latents = _denoise(
            bundle,
            prompts=prompts[rows],
            negatives=None if negative_prompts is None else negative_prompts[rows],
            seeds=seeds[rows],
            noise=noise[rows],
            users=part,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
        )
        images.append(bundle.decode_latents(latents).float())
    return torch.cat(images) if images else torch.empty(0, 3, *bundle.image_size)


def _denoise(
    bundle: DiffusionBundle,
    *,
    prompts: Sequence[str],
    negatives: Sequence[str] | None,
    seeds: Sequence[int],
    noise: Tensor,
    users: SampleUsers | None,
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    guided = guidance_scale > 1
    text = bundle.encode_text(prompts)
    if guided:
        nothing = bundle.encode_nothing(len(text.hidden))
        text = TextCondition.cat([nothing if negatives is None else bundle.encode_text(negatives), text])
    # A copy: schedulers keep state between steps, and the bundle is shared.
    scheduler = type(bundle.scheduler).from_config(bundle.scheduler.config)
    scheduler.set_timesteps(num_steps, device=bundle.device)
    extra = _step_arguments(scheduler, seeds=seeds, shape=bundle.latent_shape)
    latents: Tensor = noise.to(device=bundle.device, dtype=text.hidden.dtype) * scheduler.init_noise_sigma
    factors: Sequence[float] = ()
    if users is not None:
        users.activate(guided=guided)
        # Not num_steps: schedulers of the second order call the UNet oftener.
        factors = () if users.schedule.is_plain else users.schedule.factors(len(scheduler.timesteps))
    try:
        for number, timestep in enumerate(scheduler.timesteps):
            if users is not None and factors:
                users.attention.rescale(factors[number])
            inputs = torch.cat([latents] * 2) if guided else latents
            inputs = scheduler.scale_model_input(inputs, timestep)
            prediction = bundle.denoise(inputs, timesteps=timestep, text=text)
            if guided:
                without, conditioned = prediction.chunk(2)
                prediction = without + guidance_scale * (conditioned - without)
            latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
    finally:
        if users is not None:
            users.attention.clear()
    return latents


def _step_arguments(scheduler: Any, *, seeds: Sequence[int], shape: Sequence[int]) -> dict[str, Any]:
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for generator in generators:
        # Past the starting noise, as in the stock pipeline: repeated, it would be taken out as signal.
        torch.randn(*shape, generator=generator)
    return {"generator": generators}
