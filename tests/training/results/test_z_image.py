"""The file of a run on Z-Image with magnitudes on the input axis."""

from __future__ import annotations

from pathlib import Path

from dora_diffusion.export import inspect_adapter
from dora_diffusion.formats.adapter.file import read_adapter
from dora_diffusion.training.recipe import train
from tests.training.helpers import make_config
from tests.z_image import write_z_image


def test_magnitudes_on_the_input_axis(tmp_path: Path, samples_root: Path) -> None:
    base = write_z_image(tmp_path / "base")
    config = make_config(
        base, samples_root / "bolt_mug", tmp_path / "run", resolution=64, norm_axis="input",
        max_train_steps=1, targets=["*.to_q", "*.to_out.0"],
    )  # fmt: skip
    file = train(config).adapter
    assert file.name == "dora_diffusion_model.safetensors"
    layers = read_adapter(tmp_path / "run").layers.values()
    assert {layer.norm_axis for layer in layers} == {"input"}
    assert inspect_adapter(file, base).fits == "yes, all 8 layers"
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"`{file.name}` has ComfyUI's names, which ComfyUI computes as it was trained." in card
