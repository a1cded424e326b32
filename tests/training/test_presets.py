"""Every preset of targets on every family: trained, written, read, merged and converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.adapters.targets import TargetError
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.adapter import PRESETS
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.export import convert_adapter, export_checkpoint, verify_checkpoint
from dora_diffusion.export.files import ExportError
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.formats.layouts import CONVERSIONS, FOLDERS, PROGRAMS, TARGETS
from dora_diffusion.formats.layouts.layout import AdapterFormatError
from dora_diffusion.training.recipe import train
from tests.transformer_models import WRITERS

# Presets without a layer in a family.
WITHOUT = {
    **{name: {"b-lora-content", "b-lora-style"} for name in ("sd1", "sd2", "sd1-inpainting")},
    **{name: {"cross-attention", "b-lora-content", "b-lora-style"} for name in WRITERS},
    "anima": {"b-lora-content", "b-lora-style"},
}
# Files of other programs that are read as adapters again, on either axis.
READ_AGAIN = {"diffusers", "peft", "kohya", "diffusion_model"}


@pytest.fixture(scope="module")
def folder_of(
    deep: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            is_unet = FAMILIES[family].has_unet
            made[family] = deep(family) if is_unet else WRITERS[family](root / family)
        return made[family]

    return folder


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_is_trained_written_read_merged_and_converted(
    family: str,
    preset: str,
    axis: str,
    folder_of: Callable[[str], Path],
    small_photos: Path,
    tmp_path: Path,
    assert_same_layers: Callable[..., None],
) -> None:
    folder = folder_of(family)
    values = {
        "pretrained_model_name_or_path": str(folder), "instance_data_dir": str(small_photos),
        "instance_prompt": "a photo of a sks mug", "output_dir": str(tmp_path / "run"),
        "resolution": 64, "rank": 2, "max_train_steps": 2, "learning_rate": 1e-2, "seed": 3,
        "num_validation_images": 0, "checkpointing_steps": 0, "mixed_precision": "no",
        "targets": [preset], "norm_axis": axis,
    }  # fmt: skip
    if preset in WITHOUT.get(family, ()):
        with pytest.raises(TargetError, match=preset):
            train(TrainConfig(**values))
        return
    file = train(TrainConfig(**values)).adapter
    layers = read_adapter(file).layers
    assert all(layer.norm_axis == axis and layer.up.any() for layer in layers.values())
    for output in ("merged", "merged.safetensors"):
        merged = export_checkpoint(folder, file, tmp_path / output)
        assert verify_checkpoint(merged, folder, file).ok
    done = set()
    for target in TARGETS:
        output = tmp_path / (target if target in FOLDERS else f"{target}.safetensors")
        able = PROGRAMS.get(target) or CONVERSIONS[target]
        fit = FitSettings(rank=1) if target in ("smaller-rank", "lora", "lora-diffusers") else None
        try:
            report = convert_adapter(file, output, target, fit, base=folder)
        except (AdapterFormatError, ExportError) as error:
            if FAMILIES[family].denoiser not in able.denoisers:
                continue
            if axis == "output" or "input axis" not in str(error):
                raise
            continue
        done.add(target)
        assert report.layers == len(layers)
        if report.target in READ_AGAIN and fit is None:
            assert_same_layers(read_adapter(report.path).layers, layers)
    assert {"comfyui", "dense", "smaller-rank", "lora-diffusers"} <= done
