"""The published base models in real size, from their configurations alone: on the meta device, or random.

Numbers are those of the model folders ``stable-diffusion-v1-5`` and ``stable-diffusion-xl-base-1.0``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from prefgen.models.clip_tokenizer import train_clip_tokenizer

_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "projection_dim": 1024,
}
_VIT_BIG_G = {
    "hidden_size": 1664,
    "intermediate_size": 8192,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "projection_dim": 1280,
}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A base model's configurations.

    Attributes:
        unet: of ``UNet2DConditionModel``.
        vae: of ``AutoencoderKL``.
        texts: of each CLIP text encoder.
        image_encoder: of the CLIP image encoder that its published IP-Adapter reads.
        image_width: of its image embeddings.
        ip_adapter_parameters: numbers in that IP-Adapter.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    texts: tuple[Mapping[str, Any], ...]
    image_encoder: Mapping[str, Any]
    image_width: int
    ip_adapter_parameters: int


SD15 = Published(
    unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    vae={**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
    texts=(_CLIP_L,),
    image_encoder=_VIT_H,
    image_width=1024,
    ip_adapter_parameters=22_319_616,
)
SDXL = Published(
    unet={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
    vae={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    texts=(_CLIP_L, _CLIP_BIG_G),
    image_encoder=_VIT_BIG_G,
    image_width=1280,
    ip_adapter_parameters=351_285_248,
)


def meta_unet(model: Published) -> UNet2DConditionModel:
    """The UNet without memory: shapes and names only."""
    with torch.device("meta"):
        return UNet2DConditionModel(**model.unet).requires_grad_(False)


def meta_parts(model: Published) -> dict[str, torch.nn.Module]:
    """UNet, VAE and text encoders without memory, named as in a pipeline folder."""
    with torch.device("meta"):
        parts: dict[str, torch.nn.Module] = {
            "unet": UNet2DConditionModel(**model.unet),
            "vae": AutoencoderKL(**model.vae),
        }
        for number, text in enumerate(model.texts):
            config = CLIPTextConfig(**text, vocab_size=49408, max_position_embeddings=77)
            kind = CLIPTextModelWithProjection if number else CLIPTextModel
            parts["text_encoder_2" if number else "text_encoder"] = kind(config)
    return parts


def image_encoder_on_meta(model: Published) -> CLIPVisionModelWithProjection:
    """The image encoder without memory: patches of 14 pixels in pictures of 224."""
    with torch.device("meta"):
        return CLIPVisionModelWithProjection(
            CLIPVisionConfig(**model.image_encoder, patch_size=14, image_size=224, hidden_act="gelu")
        )


def random_unet(model: Published, *, dtype: torch.dtype, seed: int = 0) -> UNet2DConditionModel:
    """The UNet with small random weights; far quicker than each layer's own way of drawing them."""
    unet = meta_unet(model).to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return unet


def random_sd15(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in real size with random weights; its tokenizer knows a handful of words."""
    tokenizer = train_clip_tokenizer(["a red fox", "a blue boat"] * 2, vocab_size=600, max_length=77)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = CLIPTextModel(CLIPTextConfig(**_CLIP_L, vocab_size=49408, max_position_embeddings=77, **ids))
        vae = AutoencoderKL(**SD15.vae)
    return StableDiffusionPipeline(
        vae=vae.to(dtype).eval(),
        text_encoder=text.to(dtype).eval(),
        tokenizer=tokenizer,
        unet=random_unet(SD15, dtype=dtype, seed=seed).eval(),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def save_random_sd15(path: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """The same as a pipeline folder: 2 GB in bfloat16."""
    random_sd15(dtype=dtype, seed=seed).save_pretrained(path, safe_serialization=True)
    return path
