"""Random adapters: every kind of layer, magnitudes that have moved, alpha != rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.weights import LayerWeights, NormAxis


def random_layer(
    weight: Tensor,
    generator: torch.Generator,
    *,
    rank: int = 4,
    alpha: float = 3.0,
    axis: NormAxis | None = "output",
) -> LayerWeights:
    """A trained-looking layer for a weight ``(out, in, *k)``; no magnitude if ``axis`` is None."""
    out, into, *kernel = weight.shape
    size = weight.float().norm() / weight.numel() ** 0.5
    down = torch.randn(rank, into, *kernel, generator=generator)
    up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * size * 0.3
    if axis is None:
        return LayerWeights(down, up, None, alpha)
    start = weight_norm(weight, axis)
    moved = start * (1 + 0.2 * torch.randn(start.shape, generator=generator))
    return LayerWeights(down, up, moved, alpha, axis)


def is_adaptable(name: str, components: Iterable[str]) -> bool:
    """Whether a weight belongs to a Linear or Conv2d of these components."""
    return name.split(".")[0] in components and "embeddings" not in name


def random_adapter(
    folder: Path,
    *,
    axis: NormAxis | None = "output",
    components: Iterable[str] = ("unet", "text_encoder", "text_encoder_2"),
    seed: int = 0,
    mixed_ranks: bool = False,
    every: int = 1,
) -> dict[str, LayerWeights]:
    """An adapter on every ``every``-th Linear and Conv2d of a pipeline folder."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    with PipelineFolder.open(folder) as pipeline:
        names = [n for n in pipeline.module_shapes() if is_adaptable(n, components)]
        for index, name in enumerate(sorted(names)[::every]):
            rank = 2 + index % 3 if mixed_ranks else 4
            alpha = 1.0 + index % 5 if mixed_ranks else 3.0
            layers[name] = random_layer(
                pipeline[f"{name}.weight"], generator, rank=rank, alpha=alpha, axis=axis
            )
    return layers


def assert_same_layers(
    actual: dict[str, LayerWeights], expected: dict[str, LayerWeights], tolerance: float = 0.0
) -> None:
    """Compare two adapters by what they do: scale * B @ A, magnitudes and axes."""
    assert actual.keys() == expected.keys()
    for name, layer in expected.items():
        other = actual[name]
        delta = layer.scale * (layer.up.flatten(1) @ layer.down.flatten(1))
        delta_other = other.scale * (other.up.flatten(1) @ other.down.flatten(1))
        torch.testing.assert_close(delta_other, delta, rtol=0, atol=max(tolerance, 1e-6), msg=name)
        assert (other.magnitude is None) == (layer.magnitude is None), name
        if layer.magnitude is not None:
            assert other.magnitude is not None
            assert torch.equal(other.magnitude, layer.magnitude), name
            assert other.norm_axis == layer.norm_axis, name


@pytest.fixture(name="random_adapter", scope="session")
def random_adapter_fixture() -> Callable[..., dict[str, LayerWeights]]:
    """Makes an adapter for a pipeline folder."""
    return random_adapter


@pytest.fixture(name="random_layer", scope="session")
def random_layer_fixture() -> Callable[..., LayerWeights]:
    """Makes a layer for a weight."""
    return random_layer


@pytest.fixture(name="assert_same_layers", scope="session")
def assert_same_layers_fixture() -> Callable[..., None]:
    """Compares two adapters by what they do."""
    return assert_same_layers
