"""The autoencoder: 64x64 images to 8 channels of 16x16 latents.

It is trained on random colours and nonsense shapes as much as on the captioned world: an
autoencoder that has seen ten flat colours repaints a new subject in them, and personalization
then learns the repainted one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.toy.world import render
from lab.pretrain.data import (
    CAPTIONED,
    held_out_sighting,
    open_images,
    to_pixels,
)
from lab.pretrain.fit import FitSettings, Progress, fit

LATENT_CHANNELS = 8
KL_WEIGHT = 2e-4
CROPS_UNTIL = 0.6


def new_vae() -> Any:
    """A fresh autoencoder of 0.8 M parameters, downsampling by 4."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
    )


def reconstruction_loss(pixels: Tensor, rebuilt: Tensor) -> Tensor:
    """L1 and L2 of pixels, L1 of their differences (edges) and of their 4x4 means (colours)."""
    error = rebuilt - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    colors = F.avg_pool2d(error, 4).abs().mean()
    return error.abs().mean() + 4 * error.pow(2).mean() + 0.5 * edges + 0.25 * colors


def train_vae(folder: Path, minutes: float) -> Any:
    """Train on ``folder/images.npy``; the result is in ``folder/vae``, latents of unit variance.

    The first part sees 32x32 crops: four times as many images a second, and a convolutional
    network does not mind.
    """
    images = open_images(folder)
    new_images = held_out_subject_images(64)

    def loss(model: Any, progress: float, generator: torch.Generator) -> Tensor:
        cropped = progress < CROPS_UNTIL
        # Half of the batch from the nonsense shapes would starve the classes; a third does not.
        captioned = torch.randint(0, CAPTIONED, (22 if cropped else 11,), generator=generator)
        nonsense = torch.randint(
            CAPTIONED, len(images), (10 if cropped else 5,), generator=generator
        )
        batch = images[torch.cat([captioned, nonsense])]
        if cropped:
            top, left = torch.randint(0, 33, (2,), generator=generator).tolist()
            batch = batch[:, top : top + 32, left : left + 32]
        pixels = to_pixels(batch)
        if torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(pixels).latent_dist
            rebuilt = model.decode(posterior.sample(generator)).sample
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return reconstruction_loss(pixels, rebuilt.float()) + KL_WEIGHT * kl

    def report(model: Any, progress: Progress) -> None:
        print(f"  new subjects: {psnr(model, new_images):.2f} dB", flush=True)

    torch.manual_seed(0)
    settings = FitSettings(minutes, learning_rate=1.6e-3, ema_decay=0.998, weight_decay=1e-4)
    vae = fit("vae", folder, new_vae(), loss, settings, report)
    save_vae(vae, images, folder / "vae")
    return vae


def save_vae(vae: Any, images: Tensor, folder: Path) -> None:
    """Write the model with the scaling factor that gives its latents unit variance."""
    with torch.no_grad():
        latents = vae.encode(to_pixels(images[:512])).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    vae.save_pretrained(folder)


def held_out_subject_images(count: int, side: int = 64) -> Tensor:
    """One image each of subjects that no training has seen: (count, side, side, 3) uint8."""
    scenes = [held_out_sighting(i).views[0] for i in range(count)]
    return torch.from_numpy(np.stack([render(scene, side) for scene in scenes]))


@torch.no_grad()
def round_trip(vae: Any, pixels: Tensor) -> Tensor:
    """Encode to the posterior's mean and decode: (n, 3, h, w) -> (n, 3, h, w)."""
    return torch.cat(
        [vae.decode(vae.encode(p).latent_dist.mode()).sample for p in pixels.split(32)]
    )


def psnr(vae: Any, images: Tensor) -> float:
    """Mean peak signal-to-noise ratio of the round trip in dB, images (n, h, w, 3) uint8."""
    pixels = to_pixels(images)
    error = (round_trip(vae, pixels).clamp(-1, 1) - pixels).pow(2).mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())
