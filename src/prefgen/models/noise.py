"""The noise schedule of a diffusion model as plain arithmetic: noising, targets and the loss.

Worked from ``alphas_cumprod`` alone, which every diffusers scheduler holds, because the schedulers' own
``add_noise`` disagree: those written in sigmas return inputs of another scale than the UNet was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from prefgen.errors import DataError

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Variance-preserving schedule ``z_t = a_t x + s_t n`` with ``a_t^2 + s_t^2 = 1``.

    Attributes:
        alphas_cumprod: (T,) float32, ``a_t^2`` for t = 0..T-1, falling.
        prediction_type: what the UNet predicts.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType

    @staticmethod
    def of(scheduler: Any) -> NoiseSchedule:
        """The schedule a diffusers scheduler was built with.

        Raises:
            DataError: the scheduler is of another family (no ``alphas_cumprod``, or an unknown target).
        """
        kind = scheduler.config.get("prediction_type", "epsilon")
        if not hasattr(scheduler, "alphas_cumprod") or kind not in ("epsilon", "v_prediction", "sample"):
            raise DataError(
                f"scheduler {type(scheduler).__name__} with prediction_type={kind} is not supported; "
                "use a pipeline with a DDPM-family scheduler and epsilon, v_prediction or sample"
            )
        return NoiseSchedule(
            alphas_cumprod=scheduler.alphas_cumprod.float().clone(),
            prediction_type=cast(PredictionType, kind),
        )

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    def _signal_and_noise(self, timesteps: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
        squared = self.alphas_cumprod.to(like.device)[timesteps.to(like.device)]
        squared = squared.view(-1, *(1,) * (like.ndim - 1))
        return squared.sqrt(), (1 - squared).sqrt()

    def add(self, latents: Tensor, *, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (B,C,h,w) at ``timesteps`` (B,), in the dtype of ``latents``."""
        signal, spread = self._signal_and_noise(timesteps, like=latents)
        return (signal * latents.float() + spread * noise.float()).to(latents.dtype)

    def target(self, latents: Tensor, *, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should predict, (B,C,h,w) float32; v is ``a_t n - s_t x`` (arXiv 2202.00512)."""
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "sample":
            return latents.float()
        signal, spread = self._signal_and_noise(timesteps, like=latents)
        return signal * noise.float() - spread * latents.float()

    def min_snr_weight(self, timesteps: Tensor, *, gamma: float) -> Tensor:
        """Weights (B,) that bound every target's weight on x by ``gamma`` (arXiv 2303.09556, section 3.4).

        The loss on x is weighted ``min(snr, gamma)``; in the other targets the same loss reads
        ``min(snr, gamma) / snr`` for epsilon and ``min(snr, gamma) / (snr + 1)`` for v. Written in
        ``a_t^2 = snr / (snr + 1)``, so that zero terminal SNR divides nothing by zero.
        """
        squared = self.alphas_cumprod.to(timesteps.device)[timesteps]
        if self.prediction_type == "v_prediction":
            return torch.minimum(squared, gamma * (1 - squared))
        if self.prediction_type == "epsilon":
            return (gamma * (1 - squared) / squared).clamp(max=1.0)
        return (squared / (1 - squared)).clamp(max=gamma)


def noise_loss(
    prediction: Tensor,
    *,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """Squared error of the UNet's prediction, one number per image.

    Args:
        prediction: (B,C,h,w) what the UNet returned.
        latents: (B,C,h,w) clean latents.
        noise: (B,C,h,w) the noise that was added.
        timesteps: (B,) int64.
        schedule: the pipeline's schedule.
        min_snr_gamma: gamma of min-SNR weighting; None weights all timesteps alike.

    Returns:
        (B,) float32, mean over channels and places.
    """
    target = schedule.target(latents, noise=noise, timesteps=timesteps)
    loss = (prediction.float() - target).square().flatten(1).mean(dim=1)
    if min_snr_gamma is None:
        return loss
    return loss * schedule.min_snr_weight(timesteps, gamma=min_snr_gamma)


@dataclass(frozen=True, kw_only=True)
class NoiseDraw:
    """What is drawn to noise a batch, beside its timesteps.

    Attributes:
        noise: (B,C,h,w) standard normal, shifted where an offset is asked for.
        posterior_noise: (B,C,h,w) standard normal, for drawing latents from the VAE's posterior.
    """

    noise: Tensor
    posterior_noise: Tensor


def draw_timesteps(count: int, *, num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """(count,) int64, uniform in [0, num_train_timesteps)."""
    return torch.randint(0, num_train_timesteps, (count,), generator=generator)


def draw_noise(seeds: Sequence[int], *, shape: Sequence[int], offset: float = 0.0) -> NoiseDraw:
    """Noise of a batch, each image's from its own seed.

    So an image gets the same noise whatever batch, worker or rank it comes in, which makes resume exact.

    Args:
        seeds: B seeds in [0, 2^63).
        shape: (C,h,w) of one image's latents.
        offset: standard deviation of a shift common to all places of a channel, added to the noise.
    """
    noise, posterior = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(*shape, generator=generator))
        posterior.append(torch.randn(*shape, generator=generator))
        if offset:  # drawn last, so that the other two are the same with and without
            noise[-1] = noise[-1] + offset * torch.randn(shape[0], 1, 1, generator=generator)
    return NoiseDraw(noise=torch.stack(noise), posterior_noise=torch.stack(posterior))
