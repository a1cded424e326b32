"""Canonical names of live modules."""

from __future__ import annotations

from pathlib import Path

from dora_diffusion.adapters.inject import inject_adapters, remove_adapters
from dora_diffusion.adapters.state import adapter_state, load_adapter_state, module_shapes
from dora_diffusion.config import AdapterConfig


def test_the_projection_lies_beside_the_text_model(sdxl_folder: Path) -> None:
    """As in the files of diffusers, and as the formats spell it."""
    from transformers import CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection.from_pretrained(sdxl_folder / "text_encoder_2")
    components = {"text_encoder_2": encoder}
    assert module_shapes(components)["text_encoder_2.text_projection"] == (48, 64)
    inject_adapters(encoder, AdapterConfig(targets=("text_projection",), rank=2))
    state = adapter_state(components)
    assert set(state) == {"text_encoder_2.text_projection"}
    remove_adapters(encoder)
    load_adapter_state(components, state)
    assert set(adapter_state(components)) == set(state)
