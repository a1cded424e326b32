"""``dora-diffusion extract``: from two models to a file, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_diffusion.cli.main import main
from dora_diffusion.formats.adapter.file import read_adapter


@pytest.fixture(scope="module")
def tuned(trained: Path, sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with the short run's adapter merged in, in float32."""
    output = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    command = ["export", "--base", str(sd1_folder), "--adapter", str(trained)]
    assert main([*command, "--output", str(output), "--dtype", "float32"]) == 0
    return output


def test_it_says_how_near_and_who_reads_it(
    tuned: Path, trained: Path, sd1_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "found"
    command = ["extract", "--base", str(sd1_folder), "--tuned", str(tuned), "--rank", "2"]
    assert main([*command, "--output", str(output)]) == 0
    file = output / "pytorch_lora_weights.safetensors"
    first, error, *rest = capsys.readouterr().out.splitlines()
    layers = read_adapter(trained).layers
    assert (
        first == f"{file}: {len(read_adapter(file).layers)} layers, in the key format of Diffusers"
    )
    assert set(read_adapter(file).layers) <= set(layers)
    assert error.startswith("relative error of the change: median 0.0")
    assert any(line.startswith("note: no adapter for ") for line in rest)
    assert any(line.startswith("exact") and line.endswith("diffusers") for line in rest)
    assert (
        main([*command, "--output", str(output), "--method", "lora", "--overwrite", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["errors"].keys() == read_adapter(file).layers.keys()
    assert all(layer.magnitude is None for layer in read_adapter(file).layers.values())
