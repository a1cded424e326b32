"""Helpers of the tests of formats/layouts."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, Strengths

MakeAdapter = Callable[..., dict[str, LayerWeights]]


@lru_cache(maxsize=4)
def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model: opening its files for each takes the most of a test's time."""
    with PipelineFolder.open(folder) as pipeline:
        return {name: pipeline[name] for name in pipeline.specs}


def merged(folder: Path, layers: dict[str, LayerWeights], name: str) -> Tensor:
    return merge_tensor(weights_of(folder)[f"{name}.weight"], [(layers[name], Strengths())])


def module_at(pipeline: Any, name: str) -> nn.Module:
    """The live module behind a canonical name."""
    component, _, path = name.partition(".")
    model = getattr(pipeline, component)
    if component != "unet" and not hasattr(model, "text_model"):
        path = path.removeprefix("text_model.")
    module: nn.Module = model.get_submodule(path)
    return module


def assert_close_to_merge(
    weight: Tensor, folder: Path, layers: dict[str, LayerWeights], name: str
) -> None:
    """Equal to our merge within 1e-6 of its largest entry, and different from the base."""
    expected = merged(folder, layers, name)
    size = expected.abs().max().item()
    assert (weight - expected).abs().max().item() <= 1e-6 * size, name
    base = weights_of(folder)[f"{name}.weight"]
    assert (weight - base).abs().max().item() > 1e-3 * size, name


def load_pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)
