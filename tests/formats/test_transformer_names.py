"""Names of transformers' layers in every layout that holds them, by family."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.config.families import FAMILIES, denoiser_family, guess_family
from dora_diffusion.export.convert import convert_adapter
from dora_diffusion.export.files import ExportError
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.layouts import FOLDERS, LAYOUTS, TARGETS
from dora_diffusion.formats.layouts.layout import AdapterFormatError
from dora_diffusion.numerics.weights import LayerWeights
from tests.transformer_models import WRITERS

Layers = dict[str, LayerWeights]


@pytest.fixture(scope="module", params=WRITERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A family's name and a tiny model of it."""
    return request.param, WRITERS[request.param](tmp_path_factory.mktemp("model") / request.param)


def test_every_family_with_a_transformer_is_tried() -> None:
    assert WRITERS.keys() == {name for name, family in FAMILIES.items() if not family.has_unet}


@pytest.mark.parametrize("has_metadata", [True, False])
def test_every_layer_is_read_again_in_every_layout(
    model: tuple[str, Path],
    has_metadata: bool,
    tmp_path: Path,
    random_adapter: Callable[..., Layers],
    assert_same_layers: Callable[..., None],
) -> None:
    """All layers at once; a colliding name in two families' tables once was read as the other's."""
    family, folder = model
    layers = random_adapter(folder, components=["transformer"])
    width = FAMILIES[family].width_tensor[1]
    assert guess_family(dict.fromkeys(layers, (width, width))) == family
    assert FAMILIES[denoiser_family(layers)].code == FAMILIES[family].code
    with PipelineFolder.open(folder) as base:
        assert base.family.name == family
    adapter = AdapterFile(layers, AdapterMetadata(family if has_metadata else ""))
    done = set()
    for layout in LAYOUTS:
        try:
            suffix = "" if layout == "peft" else ".safetensors"
            path = write_adapter(tmp_path / f"{layout}{suffix}", adapter, layout)
        except (AdapterFormatError, ValueError):
            continue
        done.add(layout)
        assert_same_layers(read_adapter(path).layers, layers)
        with PipelineFolder.open(folder) as base:
            assert_same_layers(read_adapter(path, base).layers, layers)
    flat = {"kohya"} if family in LAYOUTS["kohya"].denoisers else set()
    assert done == {"diffusers", "peft", "diffusion_model"} | flat


def test_the_formats_that_a_refusal_names_are_written(
    model: tuple[str, Path], tmp_path: Path, random_adapter: Callable[..., Layers]
) -> None:
    family, folder = model
    layers = random_adapter(folder, components=["transformer"])
    path = write_adapter(tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata(family)))
    refused = 0
    for target in TARGETS:
        output = tmp_path / target
        try:
            convert_adapter(path, output, target, FitSettings(rank=2), base=folder)
        except (AdapterFormatError, ExportError) as error:
            named = re.search(r"one of (.*), or export", str(error))
            for other in named[1].split(", ") if named else ():
                refused += 1
                suffix = "" if other in FOLDERS else ".safetensors"
                written = tmp_path / f"{target}-{other}{suffix}"
                convert_adapter(path, written, other, base=folder)
    assert refused
