"""The autoencoder: 64 x 64 pictures to 16 x 16 x 4 latents, gated by PSNR under every attribute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from prefgen.foundation.captioned import CaptionedImages
from prefgen.foundation.loop import Loop, LoopPlan, quick

PLAN = LoopPlan(batch_size=32, steps=1500, learning_rate=2e-3, ema=0.998, weight_decay=0.0)
KL_WEIGHT = 1e-5


def build_vae(*, image_size: int) -> AutoencoderKL:
    """4x down, 4 channels, no attention: at this size the spikes found nothing better by PSNR."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=image_size,
        mid_block_add_attention=False,
    )


def pixels(images: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1].

    Contiguous: on a CPU, group norm in channels last took twice as long.
    """
    moved = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    return moved.float().contiguous(memory_format=torch.contiguous_format) / 127.5 - 1.0


def reconstruct(vae: AutoencoderKL, images: npt.NDArray[np.uint8], *, batch_size: int = 64) -> Tensor:
    """Round trip through the mean latent; float (N, 3, H, W) in [-1, 1]."""
    parts = []
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, unit="batch", desc="restoring", delay=5):
        with torch.no_grad(), quick():
            latents = vae.encode(pixels(images[start : start + batch_size])).latent_dist.mode()
            parts.append(vae.decode(latents).sample.float().clamp(-1, 1))
    return torch.cat(parts)


def psnr(images: npt.NDArray[np.uint8], restored: Tensor) -> npt.NDArray[np.float64]:
    """Peak signal-to-noise ratio of each picture in dB, shape (N,)."""
    error = (pixels(images) - restored).square().mean(dim=(1, 2, 3)).clamp_min(1e-8)
    return (10 * torch.log10(4.0 / error)).double().numpy()


def psnr_by_attribute(
    values: npt.NDArray[np.float64], attributes: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Mean dB over the pictures that show each attribute."""
    words = sorted({word for row in attributes for word in row})
    return {
        word: float(np.mean([v for v, row in zip(values, attributes, strict=True) if word in row]))
        for word in words
    }


def standardise_latents(vae: AutoencoderKL, images: npt.NDArray[np.uint8]) -> None:
    """Give each latent channel mean 0 and deviation 1, by folding it into the two 1 x 1 convolutions.

    A single scaling factor cannot do it, and the UNet would spend its steps on offsets: before, the channels'
    means lay between -2 and 2 and their deviations between 1.3 and 4. Pictures stay as they were.

    Args:
        vae: changed in place; its ``scaling_factor`` becomes 1.
        images: (N, H, W, 3) pictures that stand for all.
    """
    with torch.no_grad():
        parts = [
            vae.encode(pixels(images[start : start + 128])).latent_dist.mode()
            for start in range(0, len(images), 128)
        ]
        latents = torch.cat(parts)
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        channels = len(mean)
        into, out_of = vae.quant_conv, vae.post_quant_conv
        into.weight[:channels] /= deviation.view(-1, 1, 1, 1)
        into.bias[:channels] = (into.bias[:channels] - mean) / deviation
        into.bias[channels:] -= 2 * deviation.log()
        out_of.bias += out_of.weight[:, :, 0, 0] @ mean
        out_of.weight *= deviation.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def train_vae(
    data: CaptionedImages, heldout: CaptionedImages, *, work: Path, out: Path, plan: LoopPlan = PLAN
) -> dict[str, object]:
    """Train, standardise the latents, save to ``out`` in fp16; returns the card's figures."""
    torch.manual_seed(plan.seed)
    vae = build_vae(image_size=data.images.shape[1])
    loop = Loop(vae, plan=plan, folder=work)
    probe = heldout.images[:256]

    def loss(_: int, rng: np.random.Generator, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = np.sort(rng.integers(len(data), size=plan.batch_size))
        target = pixels(data.images[chosen])
        with quick():
            posterior = vae.encode(target).latent_dist
            restored = vae.decode(posterior.sample(generator=generator)).sample.float()
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        error = nn.functional.mse_loss(restored, target)
        sharp = nn.functional.l1_loss(restored, target)
        return {"loss": error + 0.1 * sharp + KL_WEIGHT * kl, "mse": error, "kl": kl}

    def report() -> dict[str, float]:
        return {"psnr": float(psnr(probe, reconstruct(vae, probe)).mean())}

    loop.run(loss, report=report, title="vae")
    loop.use_average()
    vae.eval()
    standardise_latents(vae, data.images[:2048])
    values = psnr(heldout.images, reconstruct(vae, heldout.images))
    by_attribute = psnr_by_attribute(values, heldout.attributes)
    worst = min(by_attribute, key=lambda word: by_attribute[word])
    vae.to(torch.float16).save_pretrained(out)
    return {
        "gate": "PSNR of unseen drawings at least 24 dB under every attribute",
        "psnr": float(values.mean()),
        "worst_attribute": worst,
        "worst_psnr": by_attribute[worst],
        "psnr_by_attribute": by_attribute,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "history": loop.history,
    }
