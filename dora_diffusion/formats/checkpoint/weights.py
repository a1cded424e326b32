"""Common interface of all that holds a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from dora_diffusion.config.families import COMPONENTS, Family
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.numerics.merging import MergeError
from dora_diffusion.numerics.weights import LayerKind


class ModelWeights(Protocol):
    """A model's weights by canonical tensor name, in a folder, a file, live modules or a merge.

    Text-encoder names have ``text_model.``, however the holder names them.
    """

    @property
    def family(self) -> Family | None:
        """Family of the model, None if that is not known."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor."""

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor."""


def module_shapes(weights: ModelWeights) -> dict[str, tuple[int, ...]]:
    """Shapes of the UNet's and text encoders' weights by canonical module name; not of vectors."""
    return {
        name.removesuffix(".weight"): spec.shape
        for name, spec in weights.specs.items()
        if name.endswith(".weight")
        and name.partition(".")[0] in COMPONENTS
        and len(spec.shape) in (2, 3, 4)
    }


def kinds_of(weights: ModelWeights) -> Mapping[str, LayerKind]:
    """Return how modules store their weight, by canonical name, as live modules say it.

    Models on disk do not, and need not: of their modules only Embeddings are not plain, and these
    adapter files name as such.
    """
    kinds: Mapping[str, LayerKind] = getattr(weights, "kinds", {})
    return kinds


def module_weight(weights: ModelWeights, name: str) -> Tensor:
    """The weight of a module, by its canonical name.

    Raises:
        MergeError: If it is quantised.
    """
    check_dtype(name, weights.specs[f"{name}.weight"].dtype)
    return weights[f"{name}.weight"]


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Check that a base weight is stored as numbers that a merge can take as they are.

    Quantised weights are not: they mean something only with their scales, which every program
    stores elsewhere, and rounding to 8 bits loses most of what an adapter changes.

    Raises:
        MergeError: If it is not.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = str(dtype).removeprefix("torch.")
        raise MergeError(
            f"the base stores {name} as {kind}: adapters are merged into weights of 16 bits or "
            "more; take this model in half precision"
        )
