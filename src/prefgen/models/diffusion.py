"""A frozen diffusion pipeline as one bundle: mini, SD 1.5 and SDXL folders alike."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prefgen.errors import DataError
from prefgen.models.image_encoder import ImageEncoder
from prefgen.models.noise import NoiseSchedule
from prefgen.models.pipeline_folder import load_parts
from prefgen.models.pixels import to_pil
from prefgen.models.text import draw_list

MemoryFormat = Literal["contiguous", "channels_last"]

COMPONENTS = (
    "unet",
    "vae",
    "text_encoder",
    "tokenizer",
    "scheduler",
    "image_encoder",
    "feature_extractor",
    "text_encoder_2",
    "tokenizer_2",
)
"""Names under which a diffusers pipeline keeps what a bundle takes from it."""


@dataclass(frozen=True, kw_only=True)
class TextCondition:
    """Encoded prompts.

    Attributes:
        hidden: (B,T,Dcross) what the text cross-attention reads.
        pooled: (B,Dtext) one vector a prompt: the last text encoder's pooled or projected state.
    """

    hidden: Tensor
    pooled: Tensor

    @staticmethod
    def cat(parts: Sequence[TextCondition]) -> TextCondition:
        """Several batches as one."""
        return TextCondition(
            hidden=torch.cat([part.hidden for part in parts]),
            pooled=torch.cat([part.pooled for part in parts]),
        )


@dataclass(frozen=True, kw_only=True)
class LatentMoments:
    """The VAE's Gaussian posterior of some images, unscaled; cached instead of pixels.

    Attributes:
        mean: (B,C,h,w).
        std: (B,C,h,w).
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True, kw_only=True)
class DiffusionBundle:
    """The parts of a stock diffusers pipeline, frozen and in eval mode.

    Attributes:
        unet: ``UNet2DConditionModel``.
        vae: ``AutoencoderKL``, possibly in a dtype of its own (SDXL's overflows in float16).
        text_encoder: first text encoder.
        tokenizer: its tokenizer.
        scheduler: the pipeline's scheduler; never stepped, a sampler makes its own copy.
        image_encoder: ``CLIPVisionModelWithProjection``, or None where the folder has none.
        feature_extractor: its preprocessing, or None.
        text_encoder_2: SDXL's second text encoder, or None.
        tokenizer_2: its tokenizer, or None.
        schedule: the noise schedule in plain numbers.
        zero_empty_text: whether no prompt means zeros instead of the encoded empty text (SDXL's base).
        size: (height, width) in pixels to work at instead of the pipeline's own; multiples of ``vae_factor``.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    image_encoder: Any
    feature_extractor: Any
    text_encoder_2: Any
    tokenizer_2: Any
    schedule: NoiseSchedule
    zero_empty_text: bool = False
    size: tuple[int, int] | None = None

    @staticmethod
    def load(
        path: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        vae_dtype: torch.dtype | None = None,
        image_encoder: str | None = None,
        memory_format: MemoryFormat = "contiguous",
        size: tuple[int, int] | None = None,
    ) -> DiffusionBundle:
        """Read a pipeline folder, or a hub id, in diffusers format.

        Args:
            path: folder or hub id.
            dtype: of the frozen weights.
            device: where they live.
            vae_dtype: of the VAE alone; None keeps ``dtype``.
            image_encoder: folder of a CLIP image encoder, for pipelines that ship none.
            memory_format: layout of the convolutions; channels_last suits bfloat16 on CPUs and new GPUs, but
                may differ from a stock pipeline in the last bits.
            size: (height, width) in pixels to work at; None takes the pipeline's own.

        Raises:
            DataError: no pipeline there, one without UNet, VAE or text encoder, pickled weights only, or a
                size that the VAE cannot divide.
        """
        parts = load_parts(path, dtypes={"default": dtype, "vae": vae_dtype or dtype})
        if image_encoder is not None:
            own = ImageEncoder.load(Path(image_encoder), dtype=dtype)
            parts["image_encoder"], parts["feature_extractor"] = own.model, own.feature_extractor
        for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            if parts.get(name) is None:
                raise DataError(f"{path}: the pipeline has no {name}; prefgen needs a UNet text-to-image one")
        kept = {name: parts.get(name) for name in COMPONENTS}
        for module in kept.values():
            if isinstance(module, torch.nn.Module):
                module.to(device=device).requires_grad_(False).eval()
        if memory_format == "channels_last":
            for name in ("unet", "vae"):
                parts[name].to(memory_format=torch.channels_last)
        bundle = DiffusionBundle.of(kept, zero_empty_text=parts["zero_empty_text"], size=size)
        if size is not None and any(side < 1 or side % bundle.size_step for side in size):
            raise DataError(f"image size {size}: this pipeline takes multiples of {bundle.size_step} pixels")
        return bundle

    @staticmethod
    def of(
        components: Mapping[str, Any], *, zero_empty_text: bool, size: tuple[int, int] | None = None
    ) -> DiffusionBundle:
        """The parts of a pipeline that is loaded already, as they are.

        Args:
            components: by their names in diffusers; others than :data:`COMPONENTS` are passed over.
            zero_empty_text: see the attribute.
            size: see the attribute.
        """
        return DiffusionBundle(
            schedule=NoiseSchedule.of(components["scheduler"]),
            zero_empty_text=zero_empty_text,
            size=size,
            **{name: components.get(name) for name in COMPONENTS},
        )

    @property
    def device(self) -> torch.device:
        """Where the UNet lives."""
        return cast(torch.device, self.unet.device)

    @property
    def cross_width(self) -> int:
        """Dcross, the width of what cross-attention reads."""
        return int(self.unet.config.cross_attention_dim)

    @property
    def image_width(self) -> int:
        """Dimage, the width of image embeddings."""
        return int(self._image_encoder().model.config.projection_dim)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C,h,w) of the latents of one image at ``size``, or at the pipeline's own."""
        if self.size is not None:
            factor = self.vae_factor
            return int(self.unet.config.in_channels), self.size[0] // factor, self.size[1] // factor
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.unet.config.in_channels), int(height), int(width)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, on a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size_step(self) -> int:
        """Pixels of which every side is a multiple: what VAE and UNet halve without remainder."""
        return self.vae_factor * int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that go with ``latent_shape``."""
        return self.latent_shape[1] * self.vae_factor, self.latent_shape[2] * self.vae_factor

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> TextCondition:
        """Encode prompts as the stock pipeline does.

        Args:
            prompts: B texts; the empty text is the unconditional one.

        Returns:
            hidden (B,T,Dcross) and pooled (B,Dtext).

        Raises:
            DataError: a prompt is longer than a text encoder takes; nothing is ever cut silently.
        """
        if self.text_encoder_2 is None:
            out = self.text_encoder(self._token_ids(prompts, tokenizer=self.tokenizer))
            return TextCondition(hidden=out.last_hidden_state, pooled=out.pooler_output)
        first = self.text_encoder(
            self._token_ids(prompts, tokenizer=self.tokenizer), output_hidden_states=True
        )
        second = self.text_encoder_2(
            self._token_ids(prompts, tokenizer=self.tokenizer_2), output_hidden_states=True
        )
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return TextCondition(hidden=hidden, pooled=second.text_embeds)

    @torch.no_grad()
    def encode_nothing(self, count: int) -> TextCondition:
        """What stands for ``count`` absent prompts under classifier-free guidance."""
        text = self.encode_text([""] * count)
        if not self.zero_empty_text:
            return text
        return TextCondition(hidden=torch.zeros_like(text.hidden), pooled=torch.zeros_like(text.pooled))

    def _token_ids(self, prompts: Sequence[str], *, tokenizer: Any) -> Tensor:
        limit = int(tokenizer.model_max_length)
        ids = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=False)["input_ids"]
        for prompt, row in zip(prompts, ids, strict=True):
            if len(row) > limit:
                raise DataError(
                    f"prompt of {len(row)} tokens for a text encoder of {limit}; shorten it: {prompt[:60]!r}"
                )
        return torch.tensor(ids, device=self.device)

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> LatentMoments:
        """Posterior of images (B,3,H,W) in [-1,1]."""
        posterior = self.vae.encode(pixels.to(device=self.device, dtype=self.vae.dtype)).latent_dist
        return LatentMoments(mean=posterior.mean, std=posterior.std)

    def draw_latents(self, moments: LatentMoments, *, noise: Tensor) -> Tensor:
        """Latents (B,C,h,w) float32 in the UNet's scale, drawn from ``moments`` with ``noise`` (B,C,h,w)."""
        drawn = moments.mean.float() + moments.std.float() * noise.to(moments.mean.device)
        return drawn.mul(self.vae.config.scaling_factor)

    def encode_latents(self, pixels: Tensor, *, generator: torch.Generator) -> Tensor:
        """Latents (B,C,h,w) in the UNet's scale of images (B,3,H,W) in [-1,1]; noise from ``generator``."""
        moments = self.encode_moments(pixels)
        noise = torch.randn(moments.mean.shape, generator=generator)
        return self.draw_latents(moments, noise=noise)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B,3,H,W), about [-1,1] and not clamped, of latents (B,C,h,w) in the UNet's scale."""
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        # A VAE in float32 is one that overflows below (SDXL's): a trainer's autocast must not undo that.
        asked = self.vae.dtype == torch.float32
        keep = torch.autocast(self.device.type, enabled=False) if asked else contextlib.nullcontext()
        with keep:
            return cast(Tensor, self.vae.decode(scaled, return_dict=False)[0])

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Image embeddings e_img.

        Args:
            images: B pictures, or pixels (B,3,H,W) in [-1,1]. Pixels go through 8-bit pictures and the same
                preprocessing, so both ways agree to the last bit for a decoded picture.

        Returns:
            (B,Dimage) float32 on the CPU.

        Raises:
            DataError: the pipeline has no image encoder.
        """
        encoder = self._image_encoder()
        return encoder.embed(to_pil(images) if isinstance(images, Tensor) else images)

    def _image_encoder(self) -> ImageEncoder:
        if self.image_encoder is None or self.feature_extractor is None:
            raise DataError(
                "the pipeline has no image encoder for e_img; pass model.image_encoder=FOLDER "
                "(a CLIPVisionModelWithProjection with its preprocessor)"
            )
        return ImageEncoder(model=self.image_encoder, feature_extractor=self.feature_extractor)

    def denoise(self, latents: Tensor, *, timesteps: Tensor, text: TextCondition) -> Tensor:
        """The UNet's prediction (B,C,h,w) for latents (B,C,h,w) at ``timesteps`` (B,) or ()."""
        return cast(
            Tensor,
            self.unet(
                latents.to(self.unet.dtype),
                timesteps,
                encoder_hidden_states=text.hidden.to(self.unet.dtype),
                added_cond_kwargs=self._added(text, latents=latents),
                return_dict=False,
            )[0],
        )

    def _added(self, text: TextCondition, *, latents: Tensor) -> dict[str, Tensor] | None:
        if self.unet.config.addition_embed_type != "text_time":
            return None
        height, width = latents.shape[-2] * self.vae_factor, latents.shape[-1] * self.vae_factor
        ids = torch.tensor(
            [[height, width, 0, 0, height, width]], device=self.device, dtype=text.pooled.dtype
        )
        return {"text_embeds": text.pooled, "time_ids": ids.expand(len(latents), -1)}


def fit_words(words: Sequence[str], *, tokenizer: Any, rng: np.random.Generator) -> str:
    """A comma list of the words in a newly drawn order, as many as the tokenizer's length takes.

    Raises:
        DataError: not even one word fits.
    """

    def num_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    return draw_list(words, rng=rng, num_tokens=num_tokens, max_tokens=int(tokenizer.model_max_length))
