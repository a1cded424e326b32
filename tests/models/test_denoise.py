"""What the UNet is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_diffusion.models.denoise import predict
from dora_diffusion.models.text import Conditioning, time_ids


class RecordingUNet:
    """Keeps its inputs, and predicts zeros."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.given: dict[str, Any] = {}

    def __call__(self, latents, timesteps, states, *, added_cond_kwargs) -> Any:
        self.given = {"latents": latents, "timesteps": timesteps, "states": states}
        self.given |= added_cond_kwargs or {}
        return SimpleNamespace(sample=torch.zeros_like(latents))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_sizes_and_timesteps_stay_exact(dtype) -> None:
    """Half precision holds no odd number above 2048, bfloat16 none above 256."""
    unet = RecordingUNet(dtype)
    sizes = (4001, 3003), (257, 0), (1023, 1025)
    predict(
        unet,
        torch.ones(1, 4, 8, 8),
        torch.tensor([999]),
        Conditioning(torch.ones(1, 77, 8), torch.ones(1, 8)),
        time_ids(*sizes)[None],
    )
    assert unet.given["time_ids"].tolist() == [[4001, 3003, 257, 0, 1023, 1025]]
    assert unet.given["timesteps"].tolist() == [999]
    for name in ("latents", "states", "text_embeds"):
        assert unet.given[name].dtype == dtype


def test_a_family_without_sizes_is_given_none() -> None:
    unet = RecordingUNet(torch.float32)
    hidden = Conditioning(torch.ones(2, 77, 8))
    predict(unet, torch.ones(2, 4, 8, 8), torch.tensor([1, 2]), hidden)
    assert set(unet.given) == {"latents", "timesteps", "states"}
