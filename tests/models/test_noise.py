"""Noise schedule: equal to diffusers' own arithmetic, and min-SNR right for each target."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from prefgen.errors import DataError
from prefgen.models.noise import NoiseSchedule, draw_noise, draw_timesteps, noise_loss

TIMES = torch.tensor([0, 250, 700, 999])


def schedule(kind, *, zero_snr=True):
    scheduler = DDIMScheduler(prediction_type=kind, rescale_betas_zero_snr=zero_snr, steps_offset=1)
    return scheduler, NoiseSchedule.of(scheduler)


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noising_and_velocity_equal_diffusers(kind):
    theirs, ours = schedule(kind)
    latents, noise = draws()
    torch.testing.assert_close(
        ours.add(latents, noise=noise, timesteps=TIMES), theirs.add_noise(latents, noise, TIMES)
    )
    if kind == "v_prediction":
        torch.testing.assert_close(
            ours.target(latents, noise=noise, timesteps=TIMES), theirs.get_velocity(latents, noise, TIMES)
        )
    else:
        assert torch.equal(ours.target(latents, noise=noise, timesteps=TIMES), noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_a_perfect_prediction_has_no_loss_and_others_have(kind, gamma):
    _, ours = schedule(kind, zero_snr=False)
    latents, noise = draws()
    target = ours.target(latents, noise=noise, timesteps=TIMES)
    facts = {"latents": latents, "noise": noise, "timesteps": TIMES, "schedule": ours, "min_snr_gamma": gamma}
    assert torch.equal(noise_loss(target, **facts), torch.zeros(4))
    assert bool((noise_loss(target + 1, **facts) > 0).all())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_bounds_the_same_loss_on_x_for_each_target(kind):
    """Shift the predicted x by 1: every target must charge min(snr, gamma) for it."""
    _, ours = schedule(kind, zero_snr=False)
    squared = ours.alphas_cumprod[TIMES]
    snr = squared / (1 - squared)
    signal, spread = squared.sqrt(), (1 - squared).sqrt()
    # d target / d x at fixed z: epsilon = (z - a x) / s, v = (a z - x) / s.
    per_x = {"epsilon": signal / spread, "v_prediction": 1 / spread, "sample": torch.ones(4)}[kind]
    charged = ours.min_snr_weight(TIMES, gamma=5.0) * per_x.square()
    torch.testing.assert_close(charged, snr.clamp(max=5.0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_zero_terminal_snr_divides_nothing_by_zero(kind):
    _, ours = schedule(kind)
    assert float(ours.alphas_cumprod[-1]) == 0.0
    weights = ours.min_snr_weight(torch.arange(1000), gamma=5.0)
    assert bool(weights.isfinite().all())
    assert bool((weights >= 0).all())


def test_noise_depends_on_the_images_own_seed_only():
    together = draw_noise([5, 6, 7], shape=(4, 8, 8))
    alone = draw_noise([6], shape=(4, 8, 8))
    assert torch.equal(together.noise[1], alone.noise[0])
    assert torch.equal(together.posterior_noise[1], alone.posterior_noise[0])
    assert not torch.equal(alone.noise, alone.posterior_noise)
    assert not torch.equal(together.noise[0], together.noise[1])


def test_timesteps_are_uniform():
    generator = torch.Generator().manual_seed(0)
    drawn = draw_timesteps(2000, num_train_timesteps=10, generator=generator)
    assert drawn.bincount(minlength=10).min() > 140


def test_a_scheduler_in_sigmas_gives_the_same_schedule():
    euler = EulerDiscreteScheduler(prediction_type="v_prediction", beta_start=0.0001, beta_end=0.02)
    ddim = DDIMScheduler(prediction_type="v_prediction", steps_offset=1)
    torch.testing.assert_close(NoiseSchedule.of(euler).alphas_cumprod, NoiseSchedule.of(ddim).alphas_cumprod)


def test_flow_matching_is_refused_with_words():
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(DataError, match="FlowMatchEulerDiscreteScheduler"):
        NoiseSchedule.of(FlowMatchEulerDiscreteScheduler())


def test_a_noise_offset_shifts_whole_channels_and_nothing_else():
    seeds = [5, 6]
    plain, shifted = (draw_noise(seeds, shape=(4, 8, 8), offset=offset) for offset in (0.0, 0.5))
    assert torch.equal(plain.posterior_noise, shifted.posterior_noise)
    shift = shifted.noise - plain.noise
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift))
    assert bool((shift != 0).all())
    many = draw_noise(range(200), shape=(4, 1, 1), offset=0.5).noise.var()
    assert float(many) == pytest.approx(1.25, rel=0.2)
