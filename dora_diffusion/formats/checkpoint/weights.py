"""Common interface of all that holds a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import COMPONENTS, Family
from dora_diffusion.formats.checkpoint.entries import Entry
from dora_diffusion.formats.checkpoint.schedule import (
    EPSILON,
    EPSILON_STEP,
    PREDICTION,
    STEP,
    Statement,
    choose_schedule,
    statements_on,
    usual_of,
)
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.numerics.weights import LayerKind

if TYPE_CHECKING:
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata


class MergeError(ValueError):
    """Base weights that cannot be merged into, or a merge that is not finite."""


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


class StoredModel(ModelWeights, Protocol):
    """The weights of a whole model on disk: a Diffusers folder or a single file."""

    @property
    def family(self) -> Family:
        """Family of the model."""

    @property
    def path(self) -> Path:
        """The folder or file."""

    @property
    def is_single_file(self) -> bool:
        """True if it is one file in the original layout."""

    @property
    def files(self) -> Mapping[str, Sequence[Path]]:
        """Weight files by component; a single file is its own ``"checkpoint"``."""

    def shards(self) -> dict[str, list[dict[str, str]]]:
        """The weight files of each component, each as names in it -> canonical names.

        A single file has none.
        """

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of its (first) weight file."""

    @property
    def other_specs(self) -> Mapping[str, TensorSpec]:
        """Tensors of no component that a single file holds, by their names in it."""

    def statements(self) -> list[Statement]:
        """Return the model's own statements on its noise schedule, the strongest first."""

    restated: Mapping[str, Any]

    def schedule(self) -> dict[str, Any]:
        """The settings of its noise schedule, as far as it states them."""

    def markers(self) -> set[str]:
        """Empty tensors by which it says, or would say, that it predicts v."""

    def naming_problems(self) -> list[str]:
        """Names by which programs miss tensors, or load others, one line each."""

    def single_file(self) -> SingleFile:
        """Return the source from which one file in the original layout is written.

        Raises:
            CheckpointLayoutError: If the model has no place in that layout.
        """


def restate_schedule(
    model: StoredModel, base: BaseModel, adapters: Sequence[AdapterMetadata]
) -> None:
    """Override a model's noise schedule by what was asked for, or what its adapters know.

    Args:
        model: The model.
        base: What it was opened as.
        adapters: What is known of those that go into it.

    Raises:
        ValueError: If zero terminal SNR is asked for of a model that predicts the noise.
    """
    said = statements_on(base, model.statements(), usual_of(model.family), adapters)
    schedule = choose_schedule(model.path.name, said)
    if not schedule.is_own:
        model.restated = schedule.settings


def schedule_tensors(model: StoredModel) -> dict[str, Tensor]:
    """The tensors of no component by which a single file says how its noise schedule is meant."""
    tensors = {name: torch.empty(0) for name in model.markers()}
    if model.family.has_two_predictions and model.schedule().get(PREDICTION) == EPSILON:
        tensors[STEP] = torch.tensor(EPSILON_STEP)
    return tensors


@dataclass(frozen=True)
class SingleFile:
    """The content of one file in the original layout.

    Attributes:
        entries: Tensors made from component tensors.
        other_specs: Dtype and shape of the others, such as the noise schedule's.
        load_other: Loads one of these.
    """

    entries: Sequence[Entry]
    other_specs: Mapping[str, TensorSpec]
    load_other: Callable[[str], Tensor]


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
