"""``dora-diffusion combine``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dora_diffusion.cli import main
from dora_diffusion.formats.adapter.file import read_adapter


def test_strengths_stand_behind_the_files(
    trained: Path, lora: Path, sd1_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A DoRA and a LoRA in one DoRA, exact without a rank; and an error where it is small."""
    output = tmp_path / "both.safetensors"
    command = ["combine", f"{trained}:0.7", f"{lora}:0.5", "--base", str(sd1_folder)]
    assert main([*command, "--alpha", "3", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "in total 0.00%" in lines[1]
    found = read_adapter(output)
    parts = read_adapter(trained).layers.keys() | read_adapter(lora, alpha=3.0).layers.keys()
    assert found.layers.keys() <= parts
    assert read_adapter(lora).layers.keys() <= found.layers.keys()
    assert found.metadata.extra["combined"].startswith("run:0.7, ")
    words = ["--alpha", "3", "--rank", "1", "--output", str(output), "--overwrite"]
    assert main([*command, *words]) == 0
    assert "in total 0.00%" not in capsys.readouterr().out


def test_one_adapter_stays_itself(
    trained: Path, sd1_folder: Path, tmp_path: Path, last_line: Callable[[], str]
) -> None:
    output = tmp_path / "same.safetensors"
    words = ["combine", str(trained), "--base", str(sd1_folder), "--output", str(output)]
    assert main(words) == 0
    before, after = read_adapter(trained).layers, read_adapter(output).layers
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].up, after[name].up) for name in before)
    assert main(words) == 1
    assert "exists" in last_line()
