"""Canonical names of live modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dora_diffusion.adapters.inject import (
    inject_adapters,
    remove_adapters,
)
from dora_diffusion.adapters.state import LiveWeights, adapter_state, load_adapter_state
from dora_diffusion.config import AdapterConfig
from dora_diffusion.formats.checkpoint.weights import module_shapes
from tests.adapters.helpers import (
    Net,
    everything,
    move,
)


def test_the_projection_lies_beside_the_text_model(sdxl_folder: Path) -> None:
    """As in the files of diffusers, and as the formats name it."""
    from transformers import CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection.from_pretrained(sdxl_folder / "text_encoder_2")
    components = {"text_encoder_2": encoder}
    weights = LiveWeights(components)
    assert module_shapes(weights)["text_encoder_2.text_projection"] == (48, 64)
    assert torch.equal(
        weights["text_encoder_2.text_projection.weight"], encoder.text_projection.weight
    )
    inject_adapters(encoder, AdapterConfig(targets=("text_projection",), rank=2))
    state = adapter_state(components)
    assert set(state) == {"text_encoder_2.text_projection"}
    remove_adapters(encoder)
    load_adapter_state(components, state)
    assert set(adapter_state(components)) == set(state)


def test_state_round_trip_and_misfits(net, x):
    inject_adapters(net, everything())
    move(net)
    y = net(x)
    state = adapter_state({"unet": net})
    assert all(key.startswith("unet.") for key in state)
    remove_adapters(net)
    load_adapter_state({"unet": net}, state)
    assert torch.equal(net(x), y)
    with pytest.raises(ValueError, match="already has an adapter"):
        load_adapter_state({"unet": net}, state)
    with pytest.raises(ValueError, match="components that the model lacks"):
        load_adapter_state({"vae": net}, state)
    state["unet.nowhere"] = state["unet.square"]
    with pytest.raises(ValueError, match="no layer nowhere"):
        load_adapter_state({"unet": Net()}, state)
