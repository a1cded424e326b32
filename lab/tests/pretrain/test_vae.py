"""The autoencoder that ships."""

from __future__ import annotations

from typing import Any

import torch

from lab.pretrain.data import to_pixels
from lab.pretrain.vae import held_out_subject_images


def test_latents_have_unit_variance(tiny_sd: Any) -> None:
    with torch.no_grad():
        latents = tiny_sd.vae.encode(to_pixels(held_out_subject_images(40))).latent_dist.mode()
    assert 0.8 < float(latents.std()) * tiny_sd.vae.config.scaling_factor < 1.25
