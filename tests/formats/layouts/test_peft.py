"""Files for Diffusers and PEFT, loaded by these libraries themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.numerics.weights import LayerWeights
from tests.formats.adapter.helpers import TABLE_HOLDS
from tests.formats.layouts.helpers import (
    MakeAdapter,
    assert_close_to_merge,
    load_pipeline,
    merged,
    module_at,
)

TABLE = "text_encoder.text_model.embeddings.token_embedding"


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_loads_the_exact_weights(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> None:
    """UNet and text encoders, all kinds of layers: fused weights equal our merge.

    The loaders only warn about keys they drop, so the values are compared.
    """
    folder = request.getfixturevalue(f"{family}_folder")
    layers = random_adapter(folder, mixed_ranks=family != "sd1", every=2)
    file = write_adapter(tmp_path, AdapterFile(layers, AdapterMetadata(family=family)))
    assert file.name == "pytorch_lora_weights.safetensors"
    pipeline = load_pipeline(folder)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    components = sorted({name.split(".")[0] for name in layers})
    pipeline.fuse_lora(components=components)
    pipeline.unload_lora_weights()
    for name in layers:
        weight = module_at(pipeline, name).weight
        assert_close_to_merge(weight, folder, layers, name)


@pytest.mark.parametrize(
    "component", ["unet", pytest.param("text_encoder", marks=TABLE_HOLDS), "text_encoder_2"]
)
def test_peft_merges_the_folder_exactly(
    tmp_path: Path, sdxl_folder: Path, component: str, random_adapter: MakeAdapter
) -> None:
    from peft import PeftModel

    layers = random_adapter(sdxl_folder, components=[component], mixed_ranks=True, every=2)
    facts = AdapterMetadata(base_model="/home/someone/models/private")
    folder = write_adapter(tmp_path, AdapterFile(layers, facts), "peft")
    model = getattr(load_pipeline(sdxl_folder), component)
    flat = not hasattr(model, "text_model")
    peft_model = PeftModel.from_pretrained(model, folder / component).merge_and_unload()
    for name in layers:
        path = name.partition(".")[2]
        path = path.removeprefix("text_model.") if flat else path
        weight = peft_model.get_submodule(path).weight
        assert_close_to_merge(weight, sdxl_folder, layers, name)
    text = (folder / component / "adapter_config.json").read_text(encoding="utf-8")
    assert "someone" not in text
    assert '"private"' in text


def test_lora_and_dora_do_not_mix_in_peft_formats(
    tmp_path: Path,
    random_layer: Callable[..., LayerWeights],
    assert_same_layers: Callable[..., None],
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 8, generator=generator)
    layers = {
        "unet.mid_block.attentions.0.proj_in": random_layer(weight, generator),
        "unet.mid_block.attentions.0.proj_out": random_layer(weight, generator, axis=None),
    }
    for target in ("diffusers", "peft"):
        with pytest.raises(AdapterFormatError, match="LoRA and DoRA layers in one component"):
            write_adapter(tmp_path, AdapterFile(layers), target)
    path = write_adapter(tmp_path, AdapterFile(layers, AdapterMetadata(family="sd1")), "kohya")
    assert_same_layers(read_adapter(path).layers, layers)


def with_table(
    folder: Path, random_adapter: MakeAdapter, **kwargs: object
) -> dict[str, LayerWeights]:
    """An adapter of a text encoder with its token embedding."""
    layers = random_adapter(folder, components=["text_encoder"], **kwargs)
    return layers | {TABLE: table_layer(folder)}


def table_layer(folder: Path) -> LayerWeights:
    generator = torch.Generator().manual_seed(7)
    with PipelineFolder.open(folder) as pipeline:
        num, dim = pipeline.specs[f"{TABLE}.weight"].shape
        table = pipeline[f"{TABLE}.weight"]
    down = torch.randn(4, num, generator=generator)
    up = 0.3 * table.std() * torch.randn(dim, 4, generator=generator)
    magnitude = table.norm(dim=0) * (1 + 0.2 * torch.randn(dim, generator=generator))
    return LayerWeights(down, up, magnitude, 3.0, kind="embedding")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_diffusers_loads_a_token_embedding(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    layers = with_table(folder, random_adapter, mixed_ranks=True)
    file = write_adapter(tmp_path, AdapterFile(layers))
    pipeline = load_pipeline(folder)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    ids = torch.arange(40)
    looked_up = module_at(pipeline, TABLE)(ids)
    torch.testing.assert_close(looked_up, merged(folder, layers, TABLE)[ids])
    pipeline.fuse_lora(components=["text_encoder"])
    pipeline.unload_lora_weights()
    for name in layers:
        assert_close_to_merge(module_at(pipeline, name).weight, folder, layers, name)


@TABLE_HOLDS
def test_peft_loads_a_token_embedding(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    from peft import PeftModel

    for name, layers in (
        ("both", with_table(sd1_folder, random_adapter)),
        ("alone", {TABLE: table_layer(sd1_folder)}),
    ):
        write_adapter(tmp_path / name, AdapterFile(layers), "peft")
        pipeline = load_pipeline(sd1_folder)
        model = PeftModel.from_pretrained(pipeline.text_encoder, tmp_path / name / "text_encoder")
        pipeline.text_encoder = model.merge_and_unload()
        for layer in layers:
            assert_close_to_merge(module_at(pipeline, layer).weight, sd1_folder, layers, layer)


def test_what_peft_writes_of_embeddings_is_read(tmp_path: Path, sd1_folder: Path) -> None:
    """PEFT's own folder, with a name for the adapter or none, with paths of today or before."""
    from peft import LoraConfig, get_peft_model

    pipeline = load_pipeline(sd1_folder)
    settings = LoraConfig(r=3, use_dora=True, target_modules=["token_embedding", "q_proj"])
    model = get_peft_model(pipeline.text_encoder, settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    with PipelineFolder.open(sd1_folder) as base:
        adapter = read_adapter(tmp_path, base)
    assert adapter.layers[TABLE].kind == "embedding"
    pipeline.text_encoder = model.merge_and_unload()
    for name in adapter.layers:
        assert_close_to_merge(module_at(pipeline, name).weight, sd1_folder, adapter.layers, name)


def test_an_embedding_alone_is_refused_for_diffusers(tmp_path: Path, sd1_folder: Path) -> None:
    """If Diffusers loads it one day, this refusal is out of date."""
    layers = {TABLE: table_layer(sd1_folder)}
    with pytest.raises(AdapterFormatError, match=r"cannot hold .*token_embedding alone"):
        write_adapter(tmp_path, AdapterFile(layers))
    file = tmp_path / "alone.safetensors"
    layer = layers[TABLE]
    save_file(
        {f"{TABLE}.lora_embedding_A": layer.down, f"{TABLE}.lora_embedding_B": layer.up}, file
    )
    with pytest.raises(ValueError, match="infer state dict type"):
        load_pipeline(sd1_folder).load_lora_weights(tmp_path, weight_name=file.name)


@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_a_grouped_convolution_is_refused(tmp_path: Path, target: str) -> None:
    layer = LayerWeights(torch.ones(2, 2, 3, 3), torch.ones(8, 2, 1, 1), groups=2)
    with pytest.raises(AdapterFormatError, match="PEFT's A sees the inputs of all groups"):
        write_adapter(tmp_path / "x", AdapterFile({"unet.conv_in": layer}), target)
