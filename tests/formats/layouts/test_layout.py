"""Factors as they are stored."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from tests.formats.layouts.helpers import (
    MakeAdapter,
)


def test_fp16_factors_keep_float32_magnitudes(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, every=9)
    for target in ("diffusers", "kohya"):
        adapter = AdapterFile(layers, AdapterMetadata(family="sd1"))
        file = write_adapter(tmp_path / target, adapter, target, dtype=torch.float16)
        for key, tensor in load_file(file).items():
            wide = "magnitude" in key or "dora_scale" in key or "alpha" in key
            assert tensor.dtype == (torch.float32 if wide else torch.float16), key
