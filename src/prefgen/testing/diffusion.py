"""A stock diffusers pipeline folder of real classes, small enough to run in every test."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from prefgen.models.clip_tokenizer import train_clip_tokenizer

TINY_IMAGE_SIZE = 16
TINY_IMAGE_DIM = 12
TINY_TEXT_DIM = 16

_CAPTIONS = (
    "a red fox, warm palette, flat fill",
    "a blue boat, cool palette, line art",
    "a green tree, soft shadow, dark background",
    "a yellow bus, striped background, high contrast",
)


def save_tiny_pipeline(path: Path, *, seed: int = 0) -> Path:
    """Write an untrained StableDiffusionPipeline folder, with image encoder and feature extractor.

    Images are 16x16, latents 4x8x8, prompts 24 tokens, text and cross-attention width 16, image embeddings
    12. The scheduler is DDIM with v-prediction and zero terminal SNR. Under 100,000 parameters in all.

    Args:
        path: folder to write.
        seed: of the weights; the global random state is left as it was.

    Returns:
        ``path``.
    """
    tokenizer = train_clip_tokenizer(_CAPTIONS * 2, vocab_size=600, max_length=24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=_tiny_vae(),
            text_encoder=_tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=_tiny_unet(),
            scheduler=_tiny_scheduler(),
            safety_checker=None,
            feature_extractor=_tiny_feature_extractor(),
            image_encoder=_tiny_image_encoder(),
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


def save_tiny_sdxl(path: Path, *, seed: int = 0) -> Path:
    """The same as a StableDiffusionXLPipeline folder: two text encoders, pooled text and time ids.

    Cross-attention width 32 (two encoders of 16), pooled text 12. No image encoder, as the published ones.
    """
    tokenizer = train_clip_tokenizer(_CAPTIONS * 2, vocab_size=600, max_length=24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = _tiny_text_encoder(tokenizer)
        pipeline = StableDiffusionXLPipeline(
            vae=_tiny_vae(),
            text_encoder=first,
            text_encoder_2=CLIPTextModelWithProjection(first.config).eval(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=_tiny_unet(
                cross_attention_dim=2 * TINY_TEXT_DIM,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + TINY_IMAGE_DIM,
            ),
            scheduler=_tiny_scheduler(),
            add_watermarker=False,
        )
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


def _tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=TINY_IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def _tiny_unet(**extra: object) -> UNet2DConditionModel:
    settings = {"cross_attention_dim": TINY_TEXT_DIM} | extra
    return UNet2DConditionModel(
        sample_size=TINY_IMAGE_SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **settings,
    )


def _tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TINY_TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=TINY_IMAGE_DIM,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def _tiny_image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=TINY_IMAGE_SIZE,
        patch_size=8,
        projection_dim=TINY_IMAGE_DIM,
    )
    return CLIPVisionModelWithProjection(config).eval()


def _tiny_feature_extractor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": TINY_IMAGE_SIZE},
        crop_size={"height": TINY_IMAGE_SIZE, "width": TINY_IMAGE_SIZE},
    )


def _tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # what the stock pipeline asks for; trailing spacing does not read it
    )
