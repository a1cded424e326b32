"""Folders that PEFT writes, and those that no LoRA or DoRA file can hold."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dora_diffusion.formats.adapter.file import AdapterFormatError, read_adapter
from dora_diffusion.formats.adapter.inspect import report_on
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.formats.files.header import TensorSpec
from dora_diffusion.merge import Strengths, merge_tensor
from dora_diffusion.numerics.weights import LayerWeights


def merged(folder: Path, layers: dict[str, LayerWeights], name: str) -> Tensor:
    with PipelineFolder.open(folder) as pipeline:
        return merge_tensor(pipeline[f"{name}.weight"], [(layers[name], Strengths())])


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


def test_a_peft_folder_made_by_peft_is_read(tmp_path: Path, sd1_folder: Path) -> None:
    """rsLoRA, alpha and rank patterns as PEFT itself writes them."""
    from peft import LoraConfig, get_peft_model

    unet = load_pipeline(sd1_folder).unet
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_dora=True,
        use_rslora=True,
        target_modules=["to_q", "to_k", "conv1"],
        rank_pattern={"to_k": 3},
        alpha_pattern={"mid_block.*conv1": 5},
        init_lora_weights=False,
    )
    model = get_peft_model(unet, config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.1
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, PipelineFolder(sd1_folder))
    fused = model.merge_and_unload()
    assert len(adapter.layers) > 20
    for name in adapter.layers:
        weight = fused.get_submodule(name.removeprefix("unet.")).weight
        assert_close_to_merge(weight, sd1_folder, adapter.layers, name)


# DORA_DIFFUSION_FUZZ=20 tries twenty times as many.
MORE = int(os.environ.get("DORA_DIFFUSION_FUZZ", "1"))


BLOCK = "mid_block.attentions.0.transformer_blocks.0"


ODD = st.one_of(
    st.sampled_from(
        ["", "{", "[]", "{}", "null", "1e999", "nan", "-1", "²", "9" * 5000, "[" * 9999, "NaN"]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
            st.sampled_from(["unet.lora_alpha", "unet.alpha_pattern", "(", "to_q", "a"]), inner,
            max_size=3,
        ),
        max_leaves=4,
    ).map(json.dumps),
)  # fmt: skip


class Held(dict[str, torch.Tensor]):
    """A base model in memory."""

    family = None

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec.of(tensor) for name, tensor in self.items()}


MODEL = Held({
    f"unet.{BLOCK}.attn1.to_q.weight": torch.ones(8, 8),
    f"unet.{BLOCK}.attn2.to_k.weight": torch.ones(6, 8),
    f"unet.{BLOCK}.attn2.to_v.weight": torch.ones(6, 8),
})  # fmt: skip


def read_or_refused(path: Path, with_model: bool) -> None:
    """What is read is whole; what is not is refused in our own words."""
    try:
        adapter = read_adapter(path, MODEL if with_model else None)
        report_on(path)
    except AdapterFormatError:
        return
    for name, layer in adapter.layers.items():
        weight = torch.ones(layer.weight_shape)
        assert math.isfinite(layer.scale)
        assert not with_model or MODEL[f"{name}.weight"].shape == layer.weight_shape
        assert layer.magnitude is None or merge_tensor(weight, [(layer, Strengths())]).numel()


@settings(max_examples=200 * MORE, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    config=st.one_of(
        ODD,
        st.dictionaries(
            st.sampled_from(["lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights"]),
            st.one_of(ODD.map(str), st.integers(), st.dictionaries(st.text(max_size=3), ODD)),
        ).map(lambda values: json.dumps({"peft_type": "LORA", **values})),
    )
)
def test_no_strange_config_gets_past_the_reader_of_peft_folders(
    config: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "unet"
    folder.mkdir(exist_ok=True)
    path = f"base_model.model.{BLOCK}.attn1.to_q"
    tensors = {
        f"{path}.lora_A.weight": torch.ones(2, 8), f"{path}.lora_B.weight": torch.ones(8, 2)
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config, "utf-8")
    read_or_refused(folder, False)


def test_whole_modules_beside_an_adapter_are_named(tmp_path: Path) -> None:
    """As PEFT itself saves them."""
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match=r"whole trained modules .*'1'"):
        read_adapter(tmp_path)


def test_a_pickled_peft_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"would run code")
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.bin is a pickle"):
        read_adapter(tmp_path)
