"""Strengths that act on nothing are said where adapters are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.cli import main
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.numerics.weights import LayerWeights


def test_a_strength_of_what_no_adapter_holds_is_said(
    tmp_path: Path,
    sd1_folder: Path,
    random_adapter: Callable[..., dict[str, LayerWeights]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    layers = random_adapter(sd1_folder, components=("unet",), every=9)
    file = write_adapter(tmp_path / "a", AdapterFile(layers), "diffusers")

    def said(*flags: str) -> list[str]:
        words = ["--base", str(sd1_folder), "--adapter", str(file), "--overwrite", *flags]
        assert main(["export", *words, "--output", str(tmp_path / "m.safetensors")]) == 0
        lines = capsys.readouterr().err.splitlines()
        return [line for line in lines if "has no effect" in line]

    assert said("--text_encoder_strength", "0.5") == [
        "warning: text_encoder_strength has no effect because no adapter holds a layer of a text "
        "encoder"
    ]
    assert said("--unet_strength", "0.5", "--magnitude_strength", "0.5") == []
