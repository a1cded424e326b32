"""Helpers of the tests of export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]


FAMILIES = ["sd1", "sd2", "sdxl"]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with PipelineFolder.open(folder) as pipeline:
        return {name: pipeline[name] for name in pipeline.specs}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
