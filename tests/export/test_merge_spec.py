"""Adapters and strengths of a merge, and its record."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch

from dora_diffusion.export import export_checkpoint, verify_checkpoint
from dora_diffusion.export.merge_spec import MergeSpec
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.formats.files.stream import file_hash
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import MergeStrengths, Strengths
from tests.every import every
from tests.export.helpers import MakeAdapter, tensors_of


def test_strength_per_component_and_several_adapters(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = [random_adapter(sdxl_folder, every=5, seed=seed) for seed in range(2)]
    paths = [
        write_adapter(tmp_path / f"{i}.safetensors", AdapterFile(one))
        for i, one in enumerate(layers)
    ]
    strength = MergeStrengths(0.9, 0.8, 1.2, unet_strength=0.5, text_encoder_strength=0.0)
    adapters = [(paths[0], 1.0), (paths[1], 0.25)]
    output = export_checkpoint(sdxl_folder, adapters, tmp_path / "merged", strength=strength)
    base, merged = tensors_of(sdxl_folder), tensors_of(output)
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if name.startswith("unet.") and module in layers[0] and name.endswith(".weight"):
            each = [
                (one[module], Strengths(own * 0.45, 0.8, 1.2))
                for one, (_, own) in zip(layers, adapters, strict=True)
                if module in one
            ]
            torch.testing.assert_close(
                merged[name], merge_tensor(weight, each), rtol=0, atol=1e-6, msg=name
            )
            assert not torch.equal(merged[name], weight)
        else:
            assert torch.equal(merged[name], weight), name
    assert verify_checkpoint(output, sdxl_folder, adapters, strength=strength).ok


def test_no_strength_is_out_of_its_limits() -> None:
    def given(name: str, strength: float) -> MergeSpec:
        if name == "adapters":
            return MergeSpec([("dog", strength)])
        return MergeSpec("dog", MergeStrengths(**{name: strength}))

    with every() as case:
        for name in ("adapters", *vars(MergeStrengths())):
            what = "the strength of dog" if name == "adapters" else name
            for value in (math.nan, math.inf, 70, -10.5):
                line = f"^{what} is {value:g}; it must be between -10 and 10"
                with case((name, value)), pytest.raises(ValueError, match=line):
                    given(name, value)
            for end in (-10, 10):
                assert given(name, end).pairs


def test_the_hubs_name_of_a_file_is_its_hash(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"large")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert file_hash([tmp_path / "model.safetensors"]) == blob.name
    assert file_hash([blob, blob]) == hashlib.sha256(b"largelarge").hexdigest()
