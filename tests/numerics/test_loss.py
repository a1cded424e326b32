"""Targets and weights against diffusers' scheduler and the definitions."""

from __future__ import annotations

import math
from functools import partial
from statistics import NormalDist

import pytest
import torch

from dora_diffusion.numerics.loss import (
    denoising_loss,
    huber_delta,
    min_snr,
    sample_noise,
    sample_timestep,
    split_prior,
    timestep_quantile,
    training_target,
)


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
    torch.testing.assert_close(min_snr(snr, "epsilon", 5.0), clipped / snr)
    torch.testing.assert_close(min_snr(snr, "v_prediction", 5.0), clipped / (snr + 1))
    # min(SNR, 5) / SNR, and min(SNR, 5) / (SNR + 1), at an SNR of 0.
    for prediction_type, expected in (("epsilon", 1.0), ("v_prediction", 0.0)):
        assert min_snr(torch.zeros(1), prediction_type, 5.0) == expected


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
    # A photo without a prior adds none.
    subject, prior = split_prior(torch.tensor([1.0, 2.0, 4.0, 8.0]), 3)
    assert (float(subject), float(prior)) == (pytest.approx(7 / 3), pytest.approx(8 / 3))


def test_a_mask_weighs_the_mean_and_an_empty_one_learns_nothing():
    pred = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.zeros_like(pred)
    mask = torch.ones(3, 1, 4, 4)
    mask[1, :, :2] = 0
    mask[2] = 0
    loss = denoising_loss(pred, target, None, mask)
    expected = [pred[0].square().mean(), pred[1, :, 2:].square().mean(), torch.tensor(0.0)]
    torch.testing.assert_close(loss, torch.stack(expected))


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("c", [0.1, 0.02, 1.5])
def test_the_huber_loss_is_that_of_sd_scripts(scheduler, schedule, c):
    """Number by number in Python's own float64, from errors of 1e-4 to ten."""
    timesteps = torch.tensor([0, 37, 500, 999])
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(4, 2, 3, 5, generator=generator) * 10.0 ** torch.arange(-4, 1)
    target = torch.randn(4, 2, 3, 5, generator=generator) * 1e-4
    delta = huber_delta(timesteps, alpha_bar, schedule, c, 1000)
    found = denoising_loss(pred, target, None, None, delta)
    for row, timestep in enumerate(timesteps.tolist()):
        a = float(alpha_bar[row])
        d = {
            "constant": c,
            "exponential": math.exp(-(-math.log(c) / 1000) * timestep),
            "snr": (1 - c) / (1 + ((1 - a) / a) ** 0.5) ** 2 + c,
        }[schedule]
        assert float(delta[row]) == pytest.approx(d, rel=1e-6)
        pairs = zip(pred[row].flatten().tolist(), target[row].flatten().tolist(), strict=True)
        each = [2 * d * (math.sqrt((x - y) ** 2 + d**2) - d) for x, y in pairs]
        assert float(found[row]) == pytest.approx(sum(each) / len(each), rel=1e-6)


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


DISTRIBUTIONS = [
    ("uniform", {}, lambda x: x),
    ("power", {"power": 1.25}, lambda x: x**0.8),
    ("power", {"power": 0.5}, lambda x: x**2),
    ("logit_normal", {}, lambda x: NormalDist().cdf(math.log(x / (1 - x)))),
    ("logit_normal", {"mean": -0.5, "std": 2.0},
     lambda x: NormalDist(-0.5, 2.0).cdf(math.log(x / (1 - x)))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "cdf"), DISTRIBUTIONS)
def test_timesteps_have_their_distribution(name, settings, cdf):
    quantile = partial(timestep_quantile, distribution=name, **settings)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample_timestep(1000, generator, quantile) for _ in range(4000)])
    assert 0 <= drawn.min() <= drawn.max() <= 999
    # Kolmogorov's bound of 99% for so many draws.
    for step in range(10, 1000, 10):
        below = (drawn < step).double().mean().item()
        assert abs(below - cdf(step / 1000)) < 1.63 / math.sqrt(4000)


def test_the_ends_of_a_distribution_are_timesteps():
    # The ends of what a generator gives, and a power whose results round to 1.
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for name, settings in (("logit_normal", {"std": 100.0}), ("power", {"power": 1e-9})):
        shares = timestep_quantile(ends, name, **settings)
        assert shares.isfinite().all()
        generator = torch.Generator().manual_seed(0)
        drawn = [
            sample_timestep(
                1000, generator, partial(timestep_quantile, distribution=name, **settings)
            )
            for _ in range(100)
        ]
        assert {int(step) for step in drawn} <= set(range(1000))
