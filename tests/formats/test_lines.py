"""What `convert` and `inspect` print: lines that agree, and a reason for what has no effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.cli import main
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]


@pytest.fixture
def lora(tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter) -> Path:
    """A plain LoRA in Diffusers' key format."""
    layers = random_adapter(sd1_folder, axis=None, components=("unet",), every=9)
    return write_adapter(tmp_path / "lora", AdapterFile(layers), "diffusers")


def test_a_plain_lora_is_not_described_as_a_dora(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How exact a file is, the verdicts say, which know what it holds."""
    output = tmp_path / "k.safetensors"
    assert main(["convert", str(lora), str(output), "--to", "kohya", "--family", "sd1"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.endswith(" layers, in the key format of kohya's sd-scripts and LyCORIS")
    assert any(line.startswith("exact: ") and "LyCORIS" in line for line in others)


def test_a_rank_without_effect_is_said(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "convert",
        str(lora),
        "--to",
        "kohya",
        "--family",
        "sd1",
        str(tmp_path / "k"),
        "--rank",
    ]
    assert main([*words, "4"]) == 0
    assert "warning: rank has no effect because kohya files keep" in capsys.readouterr().err


def test_pickles_are_not_written(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(lora), str(tmp_path / "k.ckpt"), "--to", "kohya", "--family", "sd1"]
    assert main(words) == 1
    assert "k.ckpt: pickles are not written" in capsys.readouterr().err
    assert not (tmp_path / "k.ckpt").exists()


def test_what_is_not_known_is_called_so(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(lora)]) == 0
    text = capsys.readouterr().out
    assert "LyCORIS            not known\n" in text
    assert "diffusers key format, " in text
    assert "trained\n" not in text
    assert "unet layers per block" not in text


def test_one_of_several_files_is_asked_for(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(lora.read_bytes())
    assert main(["inspect", str(tmp_path)]) == 1
    assert "name one of its files: a.safetensors, b.safetensors" in capsys.readouterr().err


def test_a_base_that_is_missing_is_asked_for_by_its_flag(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(lora), str(tmp_path / "x"), "--to", "dense"]) == 1
    assert "give that model with --base" in capsys.readouterr().err


def test_the_line_of_a_library_does_not_precede_ours(
    sd1_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Diffusers logs an error, and then raises it."""
    words = ["--base", str(sd1_folder), "--prompt", "x", "--output", str(tmp_path / "x.png")]
    assert main(["generate", *words, "--variant", "fp16"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "it has no 'fp16' variant" in line
