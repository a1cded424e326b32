"""Targets and weights against diffusers' scheduler and the definitions."""

from __future__ import annotations

import pytest
import torch

from dora_diffusion.numerics.loss import (
    denoising_loss,
    loss_weight,
    sample_noise,
    sample_timestep,
    split_prior,
    training_target,
)

GAMMA, DEBIASED = {"snr_gamma": 5.0}, {"debiased_estimation_loss": 1.0}


@pytest.fixture
def scheduler():
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_targets_are_diffusers_targets(scheduler):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 5, 6, generator=generator)
    noise = torch.randn(3, 4, 5, 6, generator=generator)
    timesteps = torch.tensor([3, 500, 999])
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(training_target("v_prediction", latents, noise, alpha_bar), velocity)
    assert training_target("epsilon", latents, noise, alpha_bar) is noise
    with pytest.raises(ValueError, match="'sample' cannot be trained"):
        training_target("sample", latents, noise, alpha_bar)


def test_min_snr_weights_are_the_papers(scheduler):
    timesteps = torch.arange(0, 1000, 37)
    alpha_bar = scheduler.alphas_cumprod[timesteps].double()
    snr = alpha_bar / (1 - alpha_bar)
    clipped = torch.minimum(snr, torch.full_like(snr, 5.0))
    torch.testing.assert_close(loss_weight(alpha_bar, "epsilon", GAMMA), clipped / snr)
    torch.testing.assert_close(loss_weight(alpha_bar, "v_prediction", GAMMA), clipped / (snr + 1))
    # min(SNR, 5) / SNR, and min(SNR, 5) / (SNR + 1), at an SNR of 0.
    for prediction_type, expected in (("epsilon", 1.0), ("v_prediction", 0.0)):
        assert loss_weight(torch.zeros(1), prediction_type, GAMMA) == expected


def test_debiased_weights_are_the_papers(scheduler):
    alpha_bar = scheduler.alphas_cumprod[torch.arange(0, 1000, 37)].double()
    noise, v = (loss_weight(alpha_bar, kind, DEBIASED) for kind in ("epsilon", "v_prediction"))
    torch.testing.assert_close(noise, ((1 - alpha_bar) / alpha_bar).sqrt())
    # The same error: the noise's square is alpha_bar times that of v.
    torch.testing.assert_close(v, noise * alpha_bar)
    for prediction_type in ("epsilon", "v_prediction"):
        assert loss_weight(torch.zeros(1), prediction_type, DEBIASED) == 0


def test_prior_loss_is_the_mean_over_its_own_samples():
    pred = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    target = torch.zeros_like(pred)
    weight = torch.tensor([1.0, 2.0, 1.0, 0.5])
    subject, prior = split_prior(denoising_loss(pred, target, weight), 2)
    each = [w * p.square().mean() for w, p in zip(weight, pred, strict=True)]
    torch.testing.assert_close(subject, (each[0] + each[1]) / 2)
    torch.testing.assert_close(prior, (each[2] + each[3]) / 2)
    subject, prior = split_prior(torch.ones(2), 2)
    assert (subject, prior) == (1, 0)
    # Weights are factors of the photos' losses alone; a photo without a prior adds none.
    per_sample = torch.tensor([1.0, 2.0, 4.0, 8.0])
    subject, prior = split_prior(per_sample, 3, torch.tensor([1.0, 0.5, 2.0]))
    assert (float(subject), float(prior)) == (pytest.approx(10 / 3), pytest.approx(8 / 3))


def test_a_mask_weighs_the_mean_and_an_empty_one_learns_nothing():
    pred = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.zeros_like(pred)
    mask = torch.ones(3, 1, 4, 4)
    mask[1, :, :2] = 0
    mask[2] = 0
    loss = denoising_loss(pred, target, None, mask)
    expected = [pred[0].square().mean(), pred[1, :, 2:].square().mean(), torch.tensor(0.0)]
    torch.testing.assert_close(loss, torch.stack(expected))


def test_draws_follow_their_generator_only():
    def draw(seed, offset=0.0):
        return sample_noise((4, 8, 8), torch.Generator().manual_seed(seed), offset)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    added = draw(1, offset=0.5) - draw(1)
    torch.testing.assert_close(added.std(dim=(1, 2)), torch.zeros(4), atol=1e-6, rtol=0)
    assert added.abs().max() > 0
    generator = torch.Generator().manual_seed(0)
    steps = torch.stack([sample_timestep(1000, generator) for _ in range(4000)])
    assert steps.min() < 10
    assert steps.max() > 990
    assert abs(steps.float().mean().item() - 499.5) < 15
