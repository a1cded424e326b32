"""``dora-diffusion extract``: from two models to a file, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
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


def test_what_has_no_effect_and_what_is_refused(
    tuned: Path, sd1_folder: Path, tmp_path: Path, last_line: Callable[[], str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["extract", "--base", str(sd1_folder), "--rank", "1"]
    output = ["--output", str(tmp_path / "a.safetensors")]
    assert main([*command, "--tuned", str(sd1_folder), *output]) == 1
    assert last_line().endswith("in every layer; there is nothing to extract")
    words = [*command, "--tuned", str(tuned), *output, "--method", "lora", "--norm_axis", "input"]
    assert main(words) == 0
    said = "warning: norm_axis has no effect because a LoRA has no magnitudes"
    assert said in capsys.readouterr().err.splitlines()
    assert main([*command, "--tuned", str(tuned), *output]) == 1
    assert "exists" in last_line()
    assert main([*command, "--tuned", str(sd1_folder), *output, "--tuned_variant", "nope"]) == 1
    assert "has no weights of the variant 'nope'" in last_line()
    assert main([*command, "--tuned", str(tuned), *output, "--tuned_variant", "fp16"]) == 1
    said = "warning: tuned_variant has no effect because the tuned model is a single file"
    assert said in capsys.readouterr().err.splitlines()
