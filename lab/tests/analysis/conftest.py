"""Adapters and models whose changes are known, beside their base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.numerics.weights import LayerWeights
from tests.training.conftest import small_photos  # noqa: F401 (a fixture)

Change = Callable[[str, Tensor], Tensor]


@pytest.fixture
def tuned_model(tmp_path: Path, sd1_folder: Path) -> Callable[[Change], Path]:
    """Writes a model whose tensors are changed by a function of name and tensor."""

    def make(change: Change, name: str = "tuned") -> Path:
        folder = Path(shutil.copytree(sd1_folder, tmp_path / name))
        for component in ("unet", "text_encoder"):
            (file,) = (folder / component).glob("*.safetensors")
            tensors = load_file(file)
            changed = {key: change(f"{component}.{key}", t) for key, t in tensors.items()}
            file.unlink()
            save_file(changed, file, {"format": "pt"})
        return folder

    return make


@pytest.fixture
def run_folder(
    tmp_path: Path, sd1_folder: Path, random_adapter: Callable[..., dict[str, LayerWeights]]
) -> Path:
    """A run with checkpoints at steps 2 and 10, and the result of step 10."""
    run = tmp_path / "run"
    for step in (2, 10):
        layers = {
            name: LayerWeights(layer.down, layer.up * step / 10, layer.magnitude, layer.alpha)
            for name, layer in random_adapter(sd1_folder, every=5).items()
        }
        facts = AdapterMetadata("sd1", extra={"training_steps": str(step)})
        for folder in [run / f"checkpoint-{step}", *([run] if step == 10 else [])]:
            write_adapter(folder, AdapterFile(layers, facts))
        torch.save({}, run / f"checkpoint-{step}" / "training_state.pt")
    return run
