"""Helpers of the tests of formats/adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.adapter.inspect import report_on
from dora_diffusion.formats.files.stream import TensorSpec
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, Strengths


def load_pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


MakeAdapter = Callable[..., dict[str, LayerWeights]]


SameLayers = Callable[..., None]


def kohya(folder: Path, layers: dict[str, LayerWeights], family: str = "sd1") -> dict[str, Tensor]:
    """The tensors of a good kohya file, to be broken."""
    path = folder / "good.safetensors"
    return load_file(write_adapter(path, AdapterFile(layers, AdapterMetadata(family)), "kohya"))


def saved(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder / "broken.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


BLOCK = "mid_block.attentions.0.transformer_blocks.0"


def kohya_linear(
    scale_shape: tuple[int, ...] | None, out: int = 6, into: int = 8
) -> dict[str, Tensor]:
    prefix = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{prefix}.lora_down.weight": torch.randn(2, into),
        f"{prefix}.lora_up.weight": torch.randn(out, 2),
        f"{prefix}.alpha": torch.tensor(2.0**0.5),
    }
    if scale_shape is not None:
        tensors[f"{prefix}.dora_scale"] = torch.rand(scale_shape)
    return tensors


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
    """Check that a file is read whole, or refused in our own words."""
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


# What the table of tools says of Diffusers and PEFT is said of releases from then on: earlier ones
# leave other layers out.
TABLE_HOLDS = pytest.mark.skipif(
    Version(metadata.version("diffusers")) < Version("0.40")
    or Version(metadata.version("transformers")) < Version("5.6"),
    reason="the table tells of later releases (docs/understand/programs.md)",
)
