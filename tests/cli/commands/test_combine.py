"""``dora-diffusion combine``."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.cli.main import main
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter, write_adapter
from tests.export.helpers import MakeAdapter


def test_strengths_stand_behind_the_files(
    trained: Path, sd1_folder: Path, tmp_path: Path, random_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A DoRA and a LoRA in one DoRA, exact without a rank; and an error where it is small."""
    layers, output = random_adapter(sd1_folder, every=20, axis=None), tmp_path / "both.safetensors"
    lora = write_adapter(tmp_path / "lora.safetensors", AdapterFile(layers))
    command = ["combine", f"{trained}:0.7", f"{lora}:0.5", "--base", str(sd1_folder)]
    assert main([*command, "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "in total 0.00%" in lines[1]
    found = read_adapter(output)
    assert layers.keys() <= found.layers.keys() <= read_adapter(trained).layers.keys() | layers
    assert all(layer.magnitude is not None for layer in found.layers.values())
    assert found.metadata.extra["combined"] == "run:0.7, lora.safetensors:0.5"
    words = ["--rank", "1", "--output", str(output), "--overwrite"]
    assert main([*command, *words]) == 0
    assert "in total 0.00%" not in capsys.readouterr().out
