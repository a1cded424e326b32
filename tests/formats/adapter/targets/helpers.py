"""What the tests of formats/adapter/targets share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.merge import Strengths, merge_tensor
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]


def merged(folder: Path, layers: dict[str, LayerWeights], name: str) -> Tensor:
    with PipelineFolder.open(folder) as pipeline:
        return merge_tensor(pipeline[f"{name}.weight"], [(layers[name], Strengths())])


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
    with PipelineFolder.open(folder) as pipeline:
        assert (weight - pipeline[f"{name}.weight"]).abs().max().item() > 1e-3 * size, name


def load_pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)
