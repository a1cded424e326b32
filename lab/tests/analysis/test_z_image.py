"""Analysis of Z-Image: places and kinds of a transformer's layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.export import export_checkpoint
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.numerics.weights import LayerWeights
from lab.analysis.analyze import analyze_weights
from lab.analysis.report import PLACES, block_of, model_order, place_of
from tests.z_image import write_z_image


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, random_adapter: Callable[..., dict[str, LayerWeights]]
) -> list[Path]:
    """A base, an adapter, and the merged model as a folder and as a diffusion model alone."""
    home = tmp_path_factory.mktemp("z-image")
    base = write_z_image(home / "base")
    layers = random_adapter(base, components=["transformer"])
    adapter = write_adapter(home / "a.safetensors", AdapterFile(layers, AdapterMetadata("z-image")))
    outputs = [export_checkpoint(base, adapter, home / name) for name in ("m", "m.safetensors")]
    return [base, adapter, *outputs]


def test_changes_are_by_place_and_kind(sources: list[Path]) -> None:
    base, *tuned = sources
    for run in analyze_weights(tuned, base).runs:
        groups = {(g.place, g.kind): len(g.layers) for g in run.checkpoints[-1].groups()}
        assert groups == {
            ("transformer in and time", "other"): 4, ("context refiner", "attention"): 4,
            ("context refiner", "feed-forward"): 3, ("noise refiner", "attention"): 4,
            ("noise refiner", "feed-forward"): 3, ("noise refiner", "other"): 1,
            ("layers 0 to 9", "attention"): 8, ("layers 0 to 9", "feed-forward"): 6,
            ("layers 0 to 9", "other"): 2, ("transformer out", "other"): 2,
        }  # fmt: skip


def test_layers_are_in_the_order_of_the_forward_pass() -> None:
    names = [
        "transformer.cap_embedder.1", "transformer.context_refiner.1.attention.to_q",
        "transformer.noise_refiner.0.feed_forward.w1", "transformer.layers.3.attention.to_q",
        "transformer.layers.12.attention.to_q", "transformer.layers.29.feed_forward.w2",
        "transformer.all_final_layer.2-1.linear",
    ]  # fmt: skip
    assert sorted({*names}, key=model_order) == names
    places = [place_of(name) for name in names]
    assert places[3:6] == ["layers 0 to 9", "layers 10 to 19", "layers 20 to 29"]
    klein = ("transformer_blocks.4.attn.to_q", "single_transformer_blocks.19.attn.to_out")
    places += (others := [place_of(f"transformer.{path}") for path in klein])
    assert others == ["double blocks 0 to 9", "single blocks 10 to 19"]
    assert {*places} < {*PLACES}
    assert block_of(names[1]) == "transformer.context_refiner.1"
