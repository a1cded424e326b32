"""Random draws and losses of training: targets, weights and prior preservation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Quantile = Callable[[Tensor], Tensor]
"""Quantile function of timesteps as shares of the noise schedule: [0, 1) -> [0, 1]."""


def timestep_quantile(
    u: Tensor, distribution: str, *, mean: float = 0.0, std: float = 1.0, power: float = 1.0
) -> Tensor:
    """Compute the quantile function of a timestep distribution, as shares of the noise schedule.

    Args:
        u: Uniform in [0, 1).
        distribution: ``"uniform"``; ``"logit_normal"``, with a normally distributed logit (Esser et
            al., arXiv:2403.03206, section 3.1); or ``"power"``: ``u ** power``, with density
            ``p x ** (p - 1)`` for ``p = 1 / power``.
        mean: Mean of the logit. Values below 0 give less noise.
        std: Standard deviation of the logit.
        power: Exponent. Values above 1 give less noise.
    """
    if distribution == "logit_normal":
        return torch.sigmoid(mean + std * torch.special.ndtri(u))
    return u**power if distribution == "power" else u


def sample_timestep(
    num_train_timesteps: int,
    generator: torch.Generator,
    quantile: Quantile | None = None,
) -> Tensor:
    """Draw a timestep, a scalar of int64.

    Args:
        num_train_timesteps: Length of the noise schedule.
        generator: Random generator.
        quantile: Quantile function of the distribution (`timestep_quantile`). Default: uniform.
    """
    if quantile is None:
        return torch.randint(num_train_timesteps, (), generator=generator)
    # A float32 draw advances the generator as an integer draw does: the later noise is the same.
    share = quantile(torch.rand((), generator=generator).double())
    return (share * num_train_timesteps).long().clamp_max(num_train_timesteps - 1)


def sample_noise(
    shape: tuple[int, int, int], generator: torch.Generator, offset: float = 0.0
) -> Tensor:
    """Draw the noise of one latent ``(C, h, w)``, float32 on the generator's device.

    Args:
        shape: ``(C, h, w)``.
        generator: Random generator.
        offset: Factor of additional noise that is constant over each channel. It lets a model learn
            the mean of an image (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if offset:
        constant = torch.randn((shape[0], 1, 1), generator=generator, device=generator.device)
        noise = noise + offset * constant
    return noise


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Apply the forward process, ``sqrt(a) latents + sqrt(1 - a) noise``: ``(B, C, h, w)``.

    Args:
        latents: ``(B, C, h, w)``.
        noise: ``(B, C, h, w)``, standard normal.
        alpha_bar: Cumulative product of alphas at each sample's timestep, ``(B,)`` (Ho et al.,
            arXiv:2006.11239, equation 4).
    """
    a = _broadcast(alpha_bar, latents)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def _broadcast(per_sample: Tensor, like: Tensor) -> Tensor:
    return per_sample.to(like).view(-1, *[1] * (like.ndim - 1))


def training_target(
    prediction_type: str, latents: Tensor, noise: Tensor, alpha_bar: Tensor
) -> Tensor:
    """Return the target of the UNet's prediction, ``(B, C, h, w)``.

    Args:
        prediction_type: ``"epsilon"`` (the noise; Ho et al., arXiv:2006.11239) or
            ``"v_prediction"`` (``sqrt(a) noise - sqrt(1 - a) latents``; arXiv:2202.00512, app. D).
        latents: ``(B, C, h, w)``.
        noise: Noise that was added to the latents.
        alpha_bar: Cumulative product of alphas at each sample's timestep, ``(B,)``.

    Raises:
        ValueError: If the prediction type is unknown.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        a = _broadcast(alpha_bar, latents)
        return a.sqrt() * noise - (1 - a).sqrt() * latents
    raise ValueError(
        f"prediction type {prediction_type!r} cannot be trained; it must be epsilon or v_prediction"
    )


def min_snr(snr: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Min-SNR-gamma (Hang et al., arXiv:2303.09556, section 3.4); the paper's gamma is 5.

    ``min(SNR, gamma) / SNR`` for noise prediction and ``min(SNR, gamma) / (SNR + 1)`` for
    v-prediction, computed without 0 / 0 at an SNR of 0.

    Args:
        snr: Signal-to-noise ratios, ``(B,)``.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
        gamma: Greatest ratio that is weighted in full.
    """
    if prediction_type == "epsilon":
        weight = gamma / snr.clamp_min(gamma)
        return torch.where(snr > gamma, weight, torch.ones_like(snr))
    return snr.clamp_max(gamma) / (snr + 1)


def huber_delta(
    timesteps: Tensor, alpha_bar: Tensor, schedule: str, c: float, num_train_timesteps: int
) -> Tensor:
    """Return the Huber delta of each sample, ``(B,)``, as sd-scripts' ``--huber_schedule``.

    Args:
        timesteps: ``(B,)``.
        alpha_bar: Cumulative products of alphas at the timesteps, ``(B,)``.
        schedule: ``"constant"``: c. ``"exponential"``: decrease from 1 to c with the timestep,
            ``c ** (t / T)``. ``"snr"``: decrease with the noise, ``(1 - c) / (1 + sigma) ** 2 + c``
            where ``sigma ** 2 = 1 / SNR``.
        c: Delta, for the other schedules the delta at pure noise.
        num_train_timesteps: Length T of the noise schedule.
    """
    if schedule == "exponential":
        return c ** (timesteps / num_train_timesteps)
    if schedule == "snr":
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        return (1 - c) / (1 + sigma).square() + c
    return torch.full_like(alpha_bar, c)


def denoising_loss(
    model_pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    delta: Tensor | None = None,
) -> Tensor:
    """Compute the mean squared error or Huber loss of each sample in float32, ``(B,)``.

    Args:
        model_pred: ``(B, C, h, w)``.
        target: ``(B, C, h, w)``, see `training_target`.
        weight: Factor of each sample, ``(B,)``, see `min_snr`.
        mask: Weights in [0, 1] for the mean, ``(B, 1, h, w)``. A sample with an empty mask has a
            loss of 0.
        delta: Deltas ``(B,)`` of the pseudo-Huber loss ``2 d (sqrt(error + d ** 2) - d)``, which is
            quadratic for small errors and linear for large ones. Default: squared error.
    """
    error = (model_pred.float() - target.float()).square()
    if delta is not None:
        d = _broadcast(delta, error)
        # Equal to the formula, but without cancellation.
        error = 2 * d * error / ((error + d.square()).sqrt() + d)
    if mask is None:
        per_sample = error.flatten(1).mean(dim=1)
    else:
        mask = mask.to(error).expand_as(error)
        covered = mask.flatten(1).sum(dim=1)
        per_sample = (error * mask).flatten(1).sum(dim=1) / covered.clamp_min(1e-6)
    return per_sample if weight is None else per_sample * weight.to(per_sample)


def split_prior(per_sample: Tensor, photos: int) -> tuple[Tensor, Tensor]:
    """Return the mean losses of the subject and of prior preservation, both per photo.

    Prior preservation (DreamBooth, arXiv:2208.12242, section 3.2) adds the weighted second loss to
    the first. A photo without prior preservation counts with 0 in the second.

    Args:
        per_sample: Losses ``(B,)`` of the photos, then of prior preservation.
        photos: Number of photos.
    """
    subject, prior = per_sample[:photos], per_sample[photos:]
    if not len(prior):
        return subject.mean(), per_sample.new_zeros(())
    return subject.mean(), prior.mean() * (len(prior) / photos)
