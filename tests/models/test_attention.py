"""Attention is torch's own, which picks flash or memory-efficient kernels on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_attention_goes_through_scaled_dot_product_attention(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In text encoders, UNet and autoencoder, as Diffusers and transformers load them."""
    components = load_components(request.getfixturevalue(f"{family}_folder"))
    calls = []
    attention = F.scaled_dot_product_attention

    def note(*args, **kwargs):
        calls.append(args)
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    with torch.no_grad():
        conditioning = encode_prompts(components, ["a dog"])
        layers = sum(encoder.config.num_hidden_layers for encoder in components.text_encoders)
        assert len(calls) == layers
        calls.clear()
        latents = torch.zeros(1, components.latent_channels, 8, 8)
        ids = torch.zeros(1, 6) if components.family.has_time_ids else None
        components.predict(latents, torch.zeros(1, dtype=torch.int64), conditioning, ids)
        assert len(calls) == len(components.denoiser.attn_processors) > 0
        calls.clear()
        components.vae.decode(components.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode())
        assert len(calls) == len(components.vae.attn_processors) == 2
