"""A stock diffusers pipeline that draws for users: text-to-image, image-to-image, inpainting, with LoRAs.

::

    from diffusers import StableDiffusionImg2ImgPipeline
    from prefgen.artefacts import Artefacts
    from prefgen.stock import StockPipeline

    stock = StockPipeline.wrap(pipe, artefacts=Artefacts.find(Path("work/x"), pipeline=Path("sd15")))
    images = stock("a red fox", image=sketch, strength=0.6, profiles=profile, user_scale=0.8).images

The pipeline's own code runs unchanged, whatever its scheduler; only the processors of its cross-attentions
are exchanged, and :meth:`StockPipeline.remove` gives it back the very ones it had.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefgen.artefacts import Artefacts
from prefgen.errors import DataError
from prefgen.models.sampling import SampleUsers
from prefgen.models.text_lora import remove_text_lora
from prefgen.models.user_schedule import CONSTANT, UserSchedule, check_negative_scale
from prefgen.painter import UserSide
from prefgen.profile import UserProfile


class StockPipeline:
    """A pipeline with a UNet, called as before and for whom besides.

    Attributes:
        pipe: the pipeline.
        side: what turns profiles into its user branch.
    """

    def __init__(self, pipe: Any, *, side: UserSide) -> None:
        self.pipe = pipe
        self.side = side

    @staticmethod
    def wrap(pipe: Any, *, artefacts: Artefacts) -> StockPipeline:
        """Install the user branch in a loaded pipeline.

        Args:
            pipe: any diffusers pipeline with a ``unet`` that the adapter was trained for. LoRAs may be loaded
                before or after.
            artefacts: adapter and projector; the pipeline folder they name, where ``pipe`` comes from, is
                compared with the one the adapter was trained with. The MLLM is not read.

        Raises:
            CheckpointError: the adapter is missing or does not fit the UNet.
            ConfigError: the UNet has processors of another kind, such as a loaded IP-Adapter's.
        """
        side = UserSide.for_unet(pipe.unet, artefacts=artefacts, device=pipe.unet.device)
        return StockPipeline(pipe, side=side)

    def remove(self) -> None:
        """Give the pipeline its own processors back, and its layers where a text LoRA was loaded."""
        self.side.adapter.attention.remove()
        remove_text_lora(self.pipe.unet)

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        profiles: UserProfile | Sequence[UserProfile],
        user_scale: float | Sequence[float] = 0.8,
        negative_user_scale: float = 0.0,
        schedule: UserSchedule = CONSTANT,
        block_scales: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> Any:
        """Draw.

        Args:
            *args: what the pipeline takes.
            profiles: for whom; one for all prompts, or one for each.
            user_scale: strength of the user branch, one number or one for each prompt; 0 is the pipeline
                without users, bit for bit.
            negative_user_scale: see :meth:`prefgen.pipeline.PrefGenPipeline.generate`.
            schedule: factor on both scales, step by step.
            block_scales: factor on both by block of the UNet.
            **settings: what the pipeline takes.

        Returns:
            What the pipeline returns.

        Raises:
            CheckpointError: a profile is of another lineage.
            DataError: profiles or scales do not match the prompts.
        """
        rows = _RowCount.of(self.pipe, args=args, settings=settings)
        if negative_user_scale:
            check_negative_scale(negative_user_scale, guidance_scale=rows.guidance_scale)
        users = [profiles] if isinstance(profiles, UserProfile) else list(profiles)
        for profile in users:
            profile.require_lineage(self.side.lineage, what="the adapter")
        scales = [user_scale] if isinstance(user_scale, int | float) else list(user_scale)
        drawn = SampleUsers.of_rows(
            self.side.adapter,
            rows=rows.each(torch.cat([self._rows(profile, side="liked") for profile in users])),
            scale=rows.each(torch.tensor(scales, dtype=torch.float32)).tolist(),
            negative_rows=rows.each(torch.cat([self._rows(profile, side="disliked") for profile in users]))
            if negative_user_scale
            else None,
            negative_scale=negative_user_scale,
        )
        drawn = replace(drawn, schedule=schedule, block_scales=block_scales)
        drawn.activate(guided=rows.guided)
        hook = None if schedule.is_plain else self.pipe.unet.register_forward_pre_hook(self._step(schedule))
        try:
            return self.pipe(*args, **settings)
        finally:
            self.side.adapter.attention.clear()
            if hook is not None:
                hook.remove()

    def _rows(self, profile: UserProfile, *, side: Any) -> Tensor:
        return self.side.adapter.fusion.rows(self.side.parts(profile, count=1, side=side))

    def _step(self, schedule: UserSchedule) -> Any:
        """A hook that scales the users anew before each call of the UNet, one for each timestep."""
        calls = 0

        def before(*_: Any) -> None:
            nonlocal calls
            factors = schedule.factors(self.pipe.num_timesteps)
            self.side.adapter.attention.rescale(factors[min(calls, len(factors) - 1)])
            calls += 1

        return before


class _RowCount:
    """How the pipeline will lay out its batch, read from the arguments of its call."""

    def __init__(self, *, prompts: int, images: int, guidance_scale: float, guided: bool) -> None:
        self.prompts, self.images = prompts, images
        self.guidance_scale, self.guided = guidance_scale, guided

    @staticmethod
    def of(pipe: Any, *, args: Sequence[Any], settings: Mapping[str, Any]) -> _RowCount:
        bound = inspect.signature(pipe.__call__).bind(*args, **settings)
        bound.apply_defaults()
        values = bound.arguments
        text = values.get("prompt") if values.get("prompt") is not None else values.get("prompt_embeds")
        if text is None:
            raise DataError("the pipeline needs a prompt or prompt_embeds to know how many images to draw")
        prompts = 1 if isinstance(text, str) else len(text)
        scale = float(values.get("guidance_scale") or 0.0)
        return _RowCount(
            prompts=prompts,
            images=int(values.get("num_images_per_prompt") or 1),
            guidance_scale=scale,
            guided=scale > 1 and pipe.unet.config.time_cond_proj_dim is None,
        )

    def each(self, values: Tensor) -> Tensor:
        """One row an image of rows for each prompt, or of one row for all."""
        if len(values) not in (1, self.prompts):
            raise DataError(
                f"{len(values)} profiles or scales for {self.prompts} prompts; give one, or one for each"
            )
        if len(values) == 1:
            values = values.expand(self.prompts, *values.shape[1:])
        return values.repeat_interleave(self.images, dim=0)
