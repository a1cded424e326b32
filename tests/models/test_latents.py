"""Latents against diffusers' own encoding, and what the UNet is given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.base import QUANTISATIONS, BaseModel
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families.stable_diffusion import predict_by_unet
from dora_diffusion.models.latents import (
    encode_moments,
    latents_from_moments,
)
from dora_diffusion.models.load import load_components, load_vae
from tests.refusal import refused


def pixels(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 64, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def encode_images(
    vae: Any, pixels: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    return latents_from_moments(vae, encode_moments(vae, pixels), generator)


@torch.no_grad()
@pytest.mark.parametrize("folder", ["sd1_folder", "sdxl_folder"])
def test_encoding_equals_diffusers(request: pytest.FixtureRequest, folder: str) -> None:
    vae = load_vae(request.getfixturevalue(folder))
    posterior = vae.encode(pixels()).latent_dist
    scale = vae.config.scaling_factor
    assert torch.equal(encode_images(vae, pixels()), posterior.mode() * scale)
    drawn = encode_images(vae, pixels(), torch.Generator().manual_seed(3))
    assert torch.equal(drawn, posterior.sample(torch.Generator().manual_seed(3)) * scale)
    assert drawn.shape == (2, 4, 8, 6)


def by_tiles(run: Any, images: torch.Tensor, size: int, scale: float) -> torch.Tensor:
    """Wide images in one row of tiles, each by itself, and faded in over a quarter of its size.

    ``scale`` is the size of what comes out over what goes in.
    """
    total, shares = torch.zeros(()), torch.zeros(())
    step, fade = size * 3 // 4, int(size * scale) // 4
    for left in range(0, images.shape[3], step):
        made, place = run(images[..., left : left + size]), int(left * scale)
        ramp = (torch.arange(made.shape[3]) / fade).clamp(max=1) if left else torch.ones(1)
        end = (int((left + step) * scale) + fade - place - torch.arange(made.shape[3])) / fade
        share = torch.minimum(ramp, end.clamp(0, 1))
        sides = (place, int(images.shape[3] * scale) - place - made.shape[3])
        total = total + F.pad(made * share, sides)
        shares = shares + F.pad(share.expand(made.shape[3]), sides)
    torch.testing.assert_close(shares, torch.ones_like(shares))
    return total


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("folder", ["sd1_folder", "sdxl_folder"])
def test_larger_images_are_taken_in_tiles(
    request: pytest.FixtureRequest, folder: str, size: int
) -> None:
    base = BaseModel(request.getfixturevalue(folder), vae_tile_size=size)
    vae, whole = load_components(base).vae, load_vae(base.path)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    images = (
        torch.rand(1, 3, size * 3 // 4, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    )
    moments = encode_moments(vae, images)
    expected = by_tiles(lambda cut: encode_moments(whole, cut), images, size, 1 / factor)
    torch.testing.assert_close(moments, expected)
    latents = moments[:, :4]
    expected = by_tiles(lambda cut: whole.decode(cut).sample, latents, size // factor, factor)
    torch.testing.assert_close(vae.decode(latents).sample, expected)
    # An image of a tile's size is taken whole.
    square = images[..., : size * 3 // 4]
    assert torch.equal(encode_moments(vae, square), encode_moments(whole, square))
    # One that is higher too has several rows of tiles.
    seen: list[int] = []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda _, given: seen.append(max(given[0].shape[2:])))
    moments = encode_moments(vae, pixels(1).repeat(1, 1, 2, 2))
    decoded = vae.decode(moments[:, :4]).sample
    tiles = {32: 6 * 4, 64: 3 * 2}[size]
    assert len(seen) == 2 * tiles
    assert max(seen[:tiles]) == factor * max(seen[tiles:]) == size
    assert decoded.shape == (1, 3, 128, 96)


def test_a_quantised_model_has_tiles_unless_told_otherwise(sd1_folder: Path) -> None:
    sizes = {
        (quantize, given): BaseModel(sd1_folder, quantize=quantize, vae_tile_size=given).tile_size
        for quantize in ("none", *QUANTISATIONS)
        for given in (None, 0, 256)
    }
    assert sizes == {
        ("none", None): 0, ("none", 0): 0, ("none", 256): 256,
        ("int8", None): 512, ("int8", 0): 0, ("int8", 256): 256,
        ("nf4", None): 512, ("nf4", 0): 0, ("nf4", 256): 256,
    }  # fmt: skip
    for quantize, is_tiled in (("none", False), ("nf4", True)):
        vae = load_components(BaseModel(sd1_folder, quantize=quantize)).vae
        assert vae.use_tiling == is_tiled
    with refused("vae_tile_size", "500; it must be a multiple of 32"):
        TrainConfig(vae_tile_size=500)


@torch.no_grad()
def test_cached_moments_draw_the_same_latents(sd1_folder: Path) -> None:
    vae = load_vae(sd1_folder)
    moments = encode_moments(vae, pixels())
    assert moments.shape == (2, 8, 8, 6)
    for seed in (None, 5):
        generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in "ab"]
        drawn = latents_from_moments(vae, moments, generators[0])
        posterior = vae.encode(pixels()).latent_dist
        latents = posterior.mode() if seed is None else posterior.sample(generators[1])
        assert torch.equal(drawn, latents * vae.config.scaling_factor)


@torch.no_grad()
def test_shifts_and_channel_statistics_are_taken_off(sd1_folder: Path) -> None:
    vae = load_vae(sd1_folder)
    raw = vae.encode(pixels()).latent_dist.mode().double()
    scale = vae.config.scaling_factor
    vae.register_to_config(shift_factor=0.5)
    shifted = encode_images(vae, pixels())
    torch.testing.assert_close(shifted.double(), (raw - 0.5) * scale)
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 3.0]
    vae.register_to_config(shift_factor=None, latents_mean=mean, latents_std=std)
    statistics = [torch.tensor(values).double().view(1, 4, 1, 1) for values in (mean, std)]
    normal = encode_images(vae, pixels())
    torch.testing.assert_close(normal.double(), (raw - statistics[0]) / statistics[1] * scale)


@torch.no_grad()
def test_a_float32_vae_takes_half_precision_from_the_unet(sdxl_folder: Path) -> None:
    vae = load_components(sdxl_folder, dtype=torch.bfloat16).vae
    latents = encode_images(vae, pixels().bfloat16())
    assert latents.dtype == torch.float32
    assert vae.decode(latents.bfloat16()).sample.dtype == torch.float32


class RecordingUNet(nn.Module):
    """Keeps its inputs, and predicts zeros."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.given: dict[str, Any] = {}

    def forward(self, latents, timesteps, states, *, added_cond_kwargs) -> Any:
        self.given = {"latents": latents, "timesteps": timesteps, "states": states}
        self.given |= added_cond_kwargs or {}
        return SimpleNamespace(sample=torch.zeros_like(latents))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_sizes_and_timesteps_stay_exact(dtype) -> None:
    """Half precision holds no odd number above 2048, bfloat16 none above 256."""
    unet = RecordingUNet(dtype)
    sizes = torch.tensor([[4001, 3003, 257, 0, 1023, 1025]], dtype=torch.float32)
    predict_by_unet(
        unet,
        torch.ones(1, 4, 8, 8),
        torch.tensor([999]),
        Conditioning(torch.ones(1, 77, 8), torch.ones(1, 8)),
        sizes,
    )
    assert unet.given["time_ids"].tolist() == [[4001, 3003, 257, 0, 1023, 1025]]
    assert unet.given["timesteps"].tolist() == [999]
    for name in ("latents", "states", "text_embeds"):
        assert unet.given[name].dtype == dtype
