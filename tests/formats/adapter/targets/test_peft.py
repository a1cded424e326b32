"""Files for Diffusers and PEFT, loaded by these libraries themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.numerics.weights import LayerWeights
from tests.formats.adapter.helpers import TABLE_HOLDS
from tests.formats.adapter.targets.helpers import (
    MakeAdapter,
    assert_close_to_merge,
    load_pipeline,
    merged,
    module_at,
)

Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


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


def test_diffusers_loads_plain_lora(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, axis=None, every=4)
    write_adapter(tmp_path, AdapterFile(layers))
    pipeline = load_pipeline(sd1_folder)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora(components=["unet", "text_encoder"])
    pipeline.unload_lora_weights()
    for name in layers:
        assert_close_to_merge(module_at(pipeline, name).weight, sd1_folder, layers, name)


@TABLE_HOLDS
def test_a_bare_magnitude_key_is_lost_by_diffusers(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """Why text-encoder magnitudes are named `.lora_magnitude_vector.weight`.

    If this fails, diffusers reads both names and the note in docs/formats.md is out of date.
    """
    layers = random_adapter(sd1_folder, components=["text_encoder"])
    file = write_adapter(tmp_path / "a", AdapterFile(layers))
    bare = {
        key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(bare, tmp_path / "bare.safetensors")
    pipeline = load_pipeline(sd1_folder)
    pipeline.load_lora_weights(tmp_path, weight_name="bare.safetensors")
    pipeline.fuse_lora(components=["text_encoder"])
    pipeline.unload_lora_weights()
    weight = module_at(pipeline, Q_PROJ).weight
    expected = merged(sd1_folder, layers, Q_PROJ)
    assert (weight - expected).abs().max() > 1e-3 * expected.abs().max()


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
