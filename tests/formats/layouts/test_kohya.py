"""Files for LyCORIS and web UIs, merged by LyCORIS itself."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open

from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.adapter.inspect import report_on
from dora_diffusion.numerics.dora import weight_norm
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, NormAxis, Strengths
from tests.formats.adapter.helpers import TABLE_HOLDS
from tests.formats.layouts.helpers import (
    MakeAdapter,
    assert_close_to_merge,
    load_pipeline,
    module_at,
)

FACTS = AdapterMetadata(
    family="sdxl",
    base_model="some/model-xl",
    trigger="a photo of sks dog",
    resolutions=(1024,),
    extra={"prediction_type": "epsilon", "steps": "500"},
)


@contextlib.contextmanager
def lycoris_axis(axis: NormAxis) -> Iterator[None]:
    """LyCORIS rebuilds modules from files with its default axis; set that for a while."""
    from lycoris.modules.locon import LoConModule

    original = LoConModule.__init__

    def with_axis(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "wd_on_out": axis == "output"})

    LoConModule.__init__ = with_axis
    try:
        yield
    finally:
        LoConModule.__init__ = original


@pytest.mark.parametrize("axis", ["output", "input", None])
def test_lycoris_merges_the_kohya_file_exactly(
    tmp_path: Path, sd1_folder: Path, axis: NormAxis | None, random_adapter: MakeAdapter
) -> None:
    """LyCORIS 3.2 and later: `wd_on_out` for the output axis, without it for the input axis."""
    from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights

    layers = random_adapter(sd1_folder, axis=axis, mixed_ranks=True, every=2)
    file = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata(family="sd1")), "kohya"
    )
    pipeline = load_pipeline(sd1_folder)
    # LyCORIS names modules by where they are; transformers 5 has one level less in a text encoder.
    nested = hasattr(pipeline.text_encoder, "text_model")
    text_prefix = "lora_te" if nested else "lora_te_text_model"
    for prefix, component in (("lora_unet", "unet"), (text_prefix, "text_encoder")):
        LycorisNetwork.LORA_PREFIX = prefix
        try:
            with lycoris_axis(axis or "output"):
                model = getattr(pipeline, component)
                network, _ = create_lycoris_from_weights(1.0, str(file), model)
            assert len(network.loras) == sum(name.startswith(f"{component}.") for name in layers)
            network.merge_to(1.0)
        finally:
            LycorisNetwork.LORA_PREFIX = "lycoris"
    for name in layers:
        assert_close_to_merge(module_at(pipeline, name).weight, sd1_folder, layers, name)


def test_kohya_shapes_and_metadata(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sdxl_folder)
    path = write_adapter(tmp_path / "my dog.safetensors", AdapterFile(layers, FACTS), "kohya")
    tensors = load_file(path)
    scales = {key: tuple(t.shape) for key, t in tensors.items() if key.endswith("dora_scale")}
    assert scales["lora_unet_out_2.dora_scale"] == (4, 1, 1, 1)
    assert scales["lora_te1_text_model_encoder_layers_0_self_attn_v_proj.dora_scale"] == (32, 1)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "3"
    assert json.loads(metadata["ss_network_args"])["dora_wd"] == "True"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.title"] == "my dog"
    assert metadata["modelspec.trigger_phrase"] == FACTS.trigger
    assert metadata["modelspec.resolution"] == "1024x1024"
    assert all(isinstance(value, str) and value for value in metadata.values())
    assert not any(str(tmp_path) in value for value in metadata.values())


def load_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def one_alpha(file: Path) -> set[float]:
    tensors = load_file(file)
    return {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}


@TABLE_HOLDS
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_loads_a_plain_lora_of_many_alphas_exactly(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> None:
    """It gives UNet attention and text encoders the commonest alpha, so that there is one alone."""
    folder = request.getfixturevalue(f"{family}_folder")
    layers = random_adapter(folder, axis=None, mixed_ranks=True, every=5)
    encoders = random_adapter(
        folder, axis=None, mixed_ranks=True, components=["text_encoder", "text_encoder_2"]
    )
    layers = {n: w for n, w in (layers | encoders).items() if "text_projection" not in n}
    adapter = AdapterFile(layers, AdapterMetadata(family=family))
    file = write_adapter(tmp_path / "a.safetensors", adapter, "kohya")
    assert one_alpha(file) == {1.0}
    assert report_on(file).tools["diffusers"].startswith("exact")
    pipeline = load_pipeline(folder)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    pipeline.fuse_lora(components=sorted({name.split(".")[0] for name in layers}))
    pipeline.unload_lora_weights()
    for name in layers:
        assert_close_to_merge(module_at(pipeline, name).weight, folder, layers, name)


@pytest.mark.parametrize("axis", ["output", None])
def test_one_alpha_changes_no_weight_and_is_told_from_that_of_the_training(
    tmp_path: Path, sd1_folder: Path, axis: NormAxis | None, random_adapter: MakeAdapter,
    assert_same_layers: Any,
) -> None:  # fmt: skip
    layers = random_adapter(sd1_folder, axis=axis, mixed_ranks=True, every=5)
    adapter = AdapterFile(layers, AdapterMetadata(family="sd1"))
    file = write_adapter(tmp_path / "a.safetensors", adapter, "kohya")
    assert one_alpha(file) == {1.0}
    read = read_adapter(file)
    assert_same_layers(read.layers, layers, 1e-5)
    assert all(torch.equal(read.layers[name].down, layer.down) for name, layer in layers.items())
    assert load_metadata(file)["ss_network_alpha"] == "1"
    report = report_on(file)
    for name, layer in layers.items():
        assert json.loads(report.alpha)[name] == f"{layer.alpha:g}"
        assert json.loads(report.rank)[name] == str(layer.rank)
    back = write_adapter(tmp_path / "diffusers", read)
    assert report_on(back).alpha == report.alpha


def test_a_kohya_file_needs_its_family(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, every=9)
    with pytest.raises(AdapterFormatError, match=r"family is unknown; .*AdapterMetadata\(family="):
        write_adapter(tmp_path, AdapterFile(layers), "kohya")
    path = write_adapter(tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata("sd1")))
    assert read_adapter(path).family == "sd1"


@pytest.mark.parametrize("axis", ["output", "input", None])
@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(8, 12, 3, padding=1, groups=4),
        torch.nn.Conv2d(8, 8, 3, stride=2, groups=8),
        torch.nn.Conv1d(8, 6, 3, padding=1),
        torch.nn.Conv1d(8, 6, 2, groups=2),
    ],
    ids=["grouped", "depthwise", "1d", "1d grouped"],
)
def test_lycoris_merges_groups_and_one_dimension(
    tmp_path: Path, layer: torch.nn.Module, axis: NormAxis | None, random_layer: Any
) -> None:
    """Its `B A` has the weight's shape, `(out, in / groups, *k)`, and so have ours."""
    from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights

    weights = random_layer(layer.weight.detach(), torch.Generator().manual_seed(0), axis=axis)
    expected = merge_tensor(layer.weight.detach(), [(weights, Strengths())])
    unet = torch.nn.ModuleDict({"conv_in": layer})
    adapter = AdapterFile({"unet.conv_in": weights}, AdapterMetadata(family="sd1"))
    file = write_adapter(tmp_path / "a.safetensors", adapter, "kohya")
    before = layer.weight.detach().clone()
    LycorisNetwork.LORA_PREFIX = "lora_unet"
    try:
        with lycoris_axis(axis or "output"):
            network, _ = create_lycoris_from_weights(1.0, str(file), unet)
        network.merge_to(1.0)
    finally:
        LycorisNetwork.LORA_PREFIX = "lycoris"
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    layer.weight.data = before
    read = read_adapter(file).layers["unet.conv_in"]
    assert (read.kind_and_size, read.norm_axis) == (weights.kind_and_size, axis or "output")
    torch.testing.assert_close(merge_tensor(before, [(read, Strengths())]), expected)


@pytest.mark.parametrize("target", ["kohya", "comfyui", "dense"])
@pytest.mark.parametrize(("kind", "name"), [("embedding", "Embedding"), ("conv1d", "Conv1D")])
def test_kinds_that_no_reader_of_kohya_files_knows_are_refused(
    tmp_path: Path, target: str, kind: Any, name: str
) -> None:
    weight = torch.ones(5, 3)
    layer = LayerWeights(
        torch.ones(2, 3), torch.ones(5, 2), weight_norm(weight, "output"), kind=kind
    )
    adapter = AdapterFile({"text_encoder.text_model.table": layer}, AdapterMetadata(family="sd1"))
    with pytest.raises(AdapterFormatError, match=f"no key for .*table, of kind {name}: .*peft"):
        write_adapter(tmp_path / "a.safetensors", adapter, target)
