"""Merged models of Anima: one file of transformer and conditioner, as ComfyUI loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import export_checkpoint, inspect_model, verify_checkpoint
from dora_diffusion.export.files import ExportError
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.models.load import load_components
from tests.anima import write_anima


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_anima(tmp_path_factory.mktemp("anima") / "model")


@pytest.fixture(scope="module")
def adapter(folder: Path, random_adapter: Callable[..., dict]) -> Path:
    layers = random_adapter(folder, components=["transformer"], axis="output")
    written = AdapterFile(layers, AdapterMetadata("anima"))
    return write_adapter(folder.parent / "adapter.safetensors", written)


def test_a_file_has_transformer_and_conditioner_and_is_a_base_model(
    tmp_path: Path, folder: Path, adapter: Path
) -> None:
    one = export_checkpoint(folder, adapter, tmp_path / "one.safetensors")
    merged = load_components(export_checkpoint(folder, adapter, tmp_path / "merged"))
    assert verify_checkpoint(one, folder, adapter).ok
    weights = load_file(one)
    parts = (merged.denoiser, merged.text_encoders[1])
    assert len(weights) == sum(len(part.state_dict()) for part in parts)
    inside = {n.removeprefix("net.llm_adapter."): t for n, t in weights.items() if "llm" in n}
    for name, tensor in merged.text_encoders[1].state_dict().items():
        assert torch.equal(inside[name], tensor)
    for prefix in ("net.", "model.diffusion_model.", ""):
        other = tmp_path / "other.safetensors"
        save_file({prefix + n.removeprefix("net."): t for n, t in weights.items()}, other)
        base = BaseModel(other, model_config=folder)
        loaded = load_components(base)
        assert loaded.family.name == "anima"
        for name, module in merged.modules().items():
            found = loaded.modules()[name].state_dict()
            assert all(torch.equal(found[k], t) for k, t in module.state_dict().items()), name
        again = load_file(
            export_checkpoint(base, (), tmp_path / "again.safetensors", overwrite=True)
        )
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in weights.items())
    assert inspect_model(one).family.name == "anima"


def test_a_complete_file_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ExportError, match="no program is known that reads its transformer"):
        export_checkpoint(folder, (), tmp_path / "all.safetensors", complete=True)
    assert not any(tmp_path.iterdir())
