"""Folders made from single files need the right configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import ExportError, export_checkpoint
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.formats.files.stream import TensorReader
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]


def test_a_folder_needs_the_right_configuration(
    tmp_path: Path, sd1_folder: Path, sd2_folder: Path, random_adapter: MakeAdapter
) -> None:
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sd1_folder, every=9))
    )
    single = export_checkpoint(sd1_folder, path, tmp_path / "base.safetensors")
    with pytest.raises(ExportError, match=r"for another model than base\.safetensors"):
        export_checkpoint(BaseModel(single, model_config=sd2_folder), path, tmp_path / "m")
    with pytest.raises(
        ExportError,
        match=r"the released model's configuration is for another .* with --model_config",
    ):
        export_checkpoint(single, path, tmp_path / "m")
    tensors = {**load_file(single), "model.diffusion_model.extra.weight": torch.ones(2, 2)}
    save_file(tensors, single)
    with pytest.raises(ExportError, match=r"extra\.weight would be left out"):
        export_checkpoint(BaseModel(single, model_config=sd1_folder), path, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_v_prediction_reaches_the_folder(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter
) -> None:
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sdxl_folder, every=20))
    )
    single = export_checkpoint(sdxl_folder, path, tmp_path / "base.safetensors")
    save_file({**load_file(single), "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, single)
    output = export_checkpoint(BaseModel(single, model_config=sdxl_folder), path, tmp_path / "m")
    scheduler = json.loads(
        (output / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    )
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    again = export_checkpoint(output, path, tmp_path / "again.safetensors")
    with TensorReader(again) as reader:
        assert {"v_pred", "ztsnr"} <= reader.specs.keys()
        assert reader.metadata["modelspec.prediction_type"] == "v"
