"""Folders that PEFT writes, and those that no LoRA or DoRA file can hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dora_diffusion.formats.adapter.file import AdapterFormatError, read_adapter
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from tests.formats.adapter.helpers import (
    BLOCK,
    ODD,
    load_pipeline,
    read_or_refused,
)
from tests.formats.layouts.helpers import assert_close_to_merge
from tests.properties import at_least, fresh


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


@at_least(200)
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
    save_file(tensors, fresh(folder / "adapter_model.safetensors"))
    fresh(folder / "adapter_config.json").write_text(config, "utf-8")
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
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    (tmp_path / "adapter_model.bin").write_bytes(b"would run code")
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.bin is a pickle"):
        read_adapter(tmp_path)
