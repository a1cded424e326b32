"""Random draws and loss of training: target, weights, and prior preservation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

Quantile = Callable[[Tensor], Tensor]
"""The share of the noise schedule that a share ``u`` of the draws lies below: [0, 1) to [0, 1]."""


def timestep_quantile(
    u: Tensor, distribution: str, *, mean: float = 0.0, std: float = 1.0, power: float = 1.0
) -> Tensor:
    """The quantile function of a distribution of timesteps, as shares of the noise schedule.

    Args:
        u: Uniform in [0, 1).
        distribution: ``"uniform"``; ``"logit_normal"``, whose logit is normal (Esser et al.,
            arXiv:2403.03206, section 3.1); or ``"power"``: ``u ** power``, of the density
            ``p x ** (p - 1)`` for ``p = 1 / power``.
        mean: Mean of the logit; below 0 there is less noise.
        std: Standard deviation of the logit.
        power: Above 1 there is less noise.
    """
    if distribution == "logit_normal":
        return torch.sigmoid(mean + std * torch.special.ndtri(u))
    return u**power if distribution == "power" else u


def sample_timestep(
    num_train_timesteps: int,
    generator: torch.Generator,
    quantile: Quantile | None = None,
) -> Tensor:
    """One timestep: scalar int64.

    Args:
        num_train_timesteps: Length of the noise schedule.
        generator: Source of the draw.
        quantile: Of the distribution (`timestep_quantile`); None is uniform.
    """
    if quantile is None:
        return torch.randint(num_train_timesteps, (), generator=generator)
    # A draw in float32, as large as that of an integer: the noise that follows stays the same.
    share = quantile(torch.rand((), generator=generator).double())
    return (share * num_train_timesteps).long().clamp_max(num_train_timesteps - 1)


def sample_noise(
    shape: tuple[int, int, int], generator: torch.Generator, offset: float = 0.0
) -> Tensor:
    """Noise of one latent ``(C, h, w)``, float32 on the generator's device.

    Args:
        shape: ``(C, h, w)``.
        generator: Source of the draw.
        offset: Share of an additional draw that is constant over each channel, with which a model
            learns to change the mean of an image (https://www.crosslabs.org/blog/
            diffusion-with-offset-noise).
    """
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if offset:
        constant = torch.randn((shape[0], 1, 1), generator=generator, device=generator.device)
        noise = noise + offset * constant
    return noise


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The forward process, ``sqrt(a) latents + sqrt(1 - a) noise``: ``(B, C, h, w)``.

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
        noise: The noise that was added to them.
        alpha_bar: Cumulative product of alphas at each sample's timestep, ``(B,)``.

    Raises:
        ValueError: If the prediction type is another one.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        a = _broadcast(alpha_bar, latents)
        return a.sqrt() * noise - (1 - a).sqrt() * latents
    raise ValueError(
        f"prediction type {prediction_type!r} cannot be trained; it must be epsilon or v_prediction"
    )


def slider_target(base: Tensor, positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Return the target of a slider: the base's prediction, moved by the difference of two prompts.

    Gandikota et al., arXiv:2311.12092, equation 8, for predictions of any type.

    Args:
        base: The base model's predictions, ``(B, C, h, w)``.
        positive: Those of the first n of these inputs for the prompt of one end, ``(n, C, h, w)``.
        negative: The same for that of the other end.
        guidance: Factor of the difference.

    Returns:
        ``(B, C, h, w)``, float32; rows after the first n are the base's.
    """
    target, count = base.float(), len(positive)
    moved = target[:count] + guidance * (positive.float() - negative.float())
    return torch.cat([moved, target[count:]])


def min_snr(snr: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Min-SNR-gamma (Hang et al., arXiv:2303.09556, section 3.4); the paper's gamma is 5.

    ``min(SNR, gamma) / SNR`` for noise prediction and ``min(SNR, gamma) / (SNR + 1)`` for
    v-prediction; both are written so that SNR 0 gives no 0 / 0.
    """
    if prediction_type == "epsilon":
        weight = gamma / snr.clamp_min(gamma)
        return torch.where(snr > gamma, weight, torch.ones_like(snr))
    return snr.clamp_max(gamma) / (snr + 1)


def debiased_estimation(snr: Tensor, prediction_type: str, _: float) -> Tensor:
    """Debiased estimation (Yu et al., arXiv:2310.08442, section 3.3).

    The noise's error is weighted by ``1 / sqrt(SNR)``, and v's, which is ``1 / a`` of it, by
    ``sqrt(SNR) / (SNR + 1)``. At SNR 0 the noise is the input itself: nothing is to be learned
    there.
    """
    if prediction_type == "epsilon":
        return torch.where(snr > 0, snr.rsqrt(), torch.zeros_like(snr))
    return snr.sqrt() / (snr + 1)


WEIGHTINGS = {"snr_gamma": min_snr, "debiased_estimation_loss": debiased_estimation}
"""Weightings of a sample's loss by setting: from its SNR, the prediction type, and the value."""


def loss_weight(
    alpha_bar: Tensor, prediction_type: str, weightings: Mapping[str, float]
) -> Tensor | None:
    """Loss weight of each sample, ``(B,)``, the product of `WEIGHTINGS`; None if all are 1.

    Args:
        alpha_bar: ``(B,)``; ``SNR = alpha_bar / (1 - alpha_bar)``.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
        weightings: Values of the settings that are set.
    """
    if not weightings:
        return None
    snr = alpha_bar / (1 - alpha_bar)
    made = [WEIGHTINGS[name](snr, prediction_type, value) for name, value in weightings.items()]
    return prod(made[1:], start=made[0])


def huber_delta(
    timesteps: Tensor, alpha_bar: Tensor, schedule: str, c: float, num_train_timesteps: int
) -> Tensor:
    """Delta of the Huber loss of each sample, ``(B,)``, after sd-scripts' ``--huber_schedule``.

    Args:
        timesteps: ``(B,)``.
        alpha_bar: ``(B,)``, at these.
        schedule: ``"constant"``: c. ``"exponential"``: from 1 to c with the timestep, ``c ** (t /
            T)``. ``"snr"``: likewise with the noise, ``(1 - c) / (1 + sigma) ** 2 + c`` where
            ``sigma ** 2 = 1 / SNR``.
        c: The delta, of the other schedules the one in pure noise.
        num_train_timesteps: T, the length of the noise schedule.
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
    """The objective: mean squared error of each sample in float32, or its Huber loss, ``(B,)``.

    Args:
        model_pred: ``(B, C, h, w)``.
        target: ``(B, C, h, w)``, see `training_target`.
        weight: Factor of each sample, ``(B,)``, see `loss_weight`.
        mask: Where to learn, ``(B, 1, h, w)`` in [0, 1]: the error becomes the mean weighted by
            it. A sample whose mask is empty has no loss.
        delta: ``(B,)``, of the pseudo-Huber loss ``2 d (sqrt(error + d ** 2) - d)``, which is the
            squared error where that is small and grows as its root; None is the squared error.
    """
    error = (model_pred.float() - target.float()).square()
    if delta is not None:
        d = _broadcast(delta, error)
        # The same without the difference of two numbers that are nearly alike.
        error = 2 * d * error / ((error + d.square()).sqrt() + d)
    if mask is None:
        per_sample = error.flatten(1).mean(dim=1)
    else:
        mask = mask.to(error).expand_as(error)
        covered = mask.flatten(1).sum(dim=1)
        per_sample = (error * mask).flatten(1).sum(dim=1) / covered.clamp_min(1e-6)
    return per_sample if weight is None else per_sample * weight.to(per_sample)


def split_prior(
    per_sample: Tensor, photos: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean loss of the subject's samples, and of what holds the prior; both per photo.

    Prior preservation (DreamBooth, arXiv:2208.12242, section 3.2) adds the second, weighted, to
    the first. A photo without a prior adds nothing to it.

    Args:
        per_sample: ``(B,)``, the photos first, then one for each photo whose prior is held.
        photos: How many they are.
        weights: Factor of each photo's loss, ``(photos,)``. They are not normalised: a photo of
            weight 2 has twice the gradient, whatever else is in the batch.
    """
    subject, prior = per_sample[:photos], per_sample[photos:]
    if weights is not None:
        subject = subject * weights
    if not len(prior):
        return subject.mean(), per_sample.new_zeros(())
    return subject.mean(), prior.mean() * (len(prior) / photos)
