"""One protocol for weights, whoever holds them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_diffusion.adapters.state import LiveWeights
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.export import export_checkpoint
from dora_diffusion.export.merged import MergedModel
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.formats.checkpoint.models import CheckpointFile, PipelineFolder
from dora_diffusion.formats.checkpoint.weights import (
    ModelWeights,
    module_shapes,
    module_weight,
)
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.weights import LayerWeights, MergeError

MakeAdapter = Callable[..., dict[str, LayerWeights]]


@contextlib.contextmanager
def holders(folder: Path, file: Path, family: str) -> Iterator[dict[str, ModelWeights]]:
    """The same model in every form."""
    live = load_components(str(folder)).adaptable()
    with (
        PipelineFolder.open(folder) as pipeline,
        CheckpointFile.open(file) as checkpoint,
    ):
        yield {
            "folder": pipeline,
            "file": checkpoint,
            "live": LiveWeights(live, FAMILIES[family]),
            "merged": MergedModel(pipeline, []),
        }


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_holder_gives_the_same_weights(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    zero = write_adapter(tmp_path / "z", AdapterFile(random_adapter(folder, every=50)))
    file = export_checkpoint(folder, zero, tmp_path / "base.safetensors", strength=0.0)
    with holders(folder, file, family) as models:
        reference = models.pop("folder")
        shapes = module_shapes(reference)
        assert {name.partition(".")[0] for name in shapes} >= {"unet", "text_encoder"}
        for kind, model in models.items():
            assert model.family == FAMILIES[family]
            assert module_shapes(model) == shapes, kind
            for name in shapes:
                weight = module_weight(model, name)
                assert torch.equal(weight, reference[f"{name}.weight"]), (kind, name)
                assert model.specs[f"{name}.weight"] == TensorSpec.of(weight)


class Quantised(dict[str, Tensor]):
    family = None

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec.of(tensor) for name, tensor in self.items()}


def test_quantised_weights_are_not_given() -> None:
    model = Quantised({"unet.a.weight": torch.ones(2, 2, dtype=torch.int8)})
    with pytest.raises(MergeError, match=r"the base stores unet\.a as int8"):
        module_weight(model, "unet.a")
