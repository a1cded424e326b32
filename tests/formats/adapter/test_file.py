"""One adapter on disk: every key format holds it, and damaged files are refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dora_diffusion.cli.main import main
from dora_diffusion.formats.adapter import file as adapter_file
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterFormatError,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.formats.files import stream as safetensors_stream
from dora_diffusion.formats.files.atomic import DiskFullError
from dora_diffusion.formats.files.stream import read_header
from dora_diffusion.numerics.weights import NormAxis
from tests.formats.adapter.helpers import (
    MakeAdapter,
    kohya_linear,
)

FACTS = AdapterMetadata(
    family="sdxl",
    base_model="some/model-xl",
    trigger="a photo of sks dog",
    resolutions=(1024,),
    extra={"prediction_type": "epsilon", "steps": "500"},
)


@pytest.mark.parametrize("target", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("axis", ["output", "input", None])
def test_round_trip(
    tmp_path: Path,
    deep: Callable[[str], Path],
    target: str,
    axis: NormAxis | None,
    random_adapter: MakeAdapter,
    assert_same_layers: Callable[..., None],
) -> None:
    """Reading gives the same effective layers and facts; writing again gives the same bytes."""
    folder = deep("sdxl")
    layers = random_adapter(folder, axis=axis, mixed_ranks=True, every=3)
    adapter = AdapterFile(layers, FACTS)
    if axis == "input" and target != "kohya":
        with pytest.raises(AdapterFormatError, match=r"input axis.*kohya format"):
            write_adapter(tmp_path / "a", adapter, target)
        return
    first = write_adapter(tmp_path / "a", adapter, target)
    shapes = PipelineFolder(folder)
    for read in (read_adapter(tmp_path / "a"), read_adapter(first, shapes)):
        assert_same_layers(read.layers, layers)
        assert {n: layer.rank for n, layer in read.layers.items()} == {
            n: layer.rank for n, layer in layers.items()
        }
        assert read.metadata.family == "sdxl"
        assert read.metadata.trigger == FACTS.trigger
        assert read.metadata.resolutions == (1024,)
        assert read.metadata.base_model == "some/model-xl"
        assert read.metadata.extra["steps"] == "500"
    write_adapter(tmp_path / "b", read_adapter(first), target)
    again = {p.relative_to(tmp_path / "b"): p for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert again
    for relative, file in again.items():
        assert file.read_bytes() == (tmp_path / "a" / relative).read_bytes(), relative


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = kohya_linear((6, 1))
    broken = {key: value * float("nan") for key, value in tensors.items()}
    save_file(broken, path)
    with pytest.raises(AdapterFormatError, match="not finite"):
        read_adapter(path)
    save_file({k: v for k, v in tensors.items() if "lora_up" not in k}, path)
    with pytest.raises(AdapterFormatError, match="lacks its up factor"):
        read_adapter(path)
    save_file({}, path)
    with pytest.raises(AdapterFormatError, match="no tensors"):
        read_adapter(path)
    path.write_bytes(b"not a tensor file")
    with pytest.raises(AdapterFormatError, match="not a safetensors file"):
        read_adapter(path)


def test_folders_are_searched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        read_adapter(tmp_path / "nothing")
    with pytest.raises(AdapterFormatError, match="no adapter file"):
        read_adapter(tmp_path)
    save_file(kohya_linear(None), tmp_path / "one.safetensors")
    assert len(read_adapter(tmp_path).layers) == 1
    save_file(kohya_linear(None), tmp_path / "two.safetensors")
    with pytest.raises(AdapterFormatError, match=r"one\.safetensors, two\.safetensors"):
        read_adapter(tmp_path)


def test_a_full_disk_leaves_the_old_adapter(
    tmp_path: Path, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch, random_adapter: MakeAdapter
) -> None:
    adapter = AdapterFile(random_adapter(sd1_folder, every=9))
    path = write_adapter(tmp_path, adapter)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_stream, "_write_one", full)
    with pytest.raises(DiskFullError, match="the disk is full"):
        write_adapter(tmp_path, adapter)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "a.pt", "a.ckpt", "a.pth"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"would run code")
    with pytest.raises(AdapterFormatError, match="is a pickle, which can run code"):
        read_adapter(tmp_path / name)


def test_a_peft_folder_is_replaced_as_a_whole(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch,
    assert_same_layers: Callable[..., None],
) -> None:  # fmt: skip
    """Neither half of a new adapter is left, nor an old text encoder beside a new UNet."""
    both = random_adapter(sd1_folder, every=5)
    alone = random_adapter(sd1_folder, every=5, components=["unet"], seed=2)
    folder = write_adapter(tmp_path / "p", AdapterFile(both), "peft")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert len(before) == 4
    save, count = adapter_file.write_tensors, 0

    def full_at_the_second(path: Path, *rest: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(adapter_file, "write_tensors", full_at_the_second)
        for path in (folder, tmp_path / "new"):
            count = 0
            with pytest.raises(DiskFullError, match=r"adapter_model\.safetensors could not"):
                write_adapter(path, AdapterFile(both), "peft")
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "new").exists()
    write_adapter(folder, AdapterFile(alone), "peft")
    assert_same_layers(read_adapter(folder).layers, alone)


@pytest.mark.parametrize("target", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("says_family", [True, False])
def test_an_adapter_of_another_family_is_named(
    tmp_path: Path,
    sd1_folder: Path,
    sdxl_folder: Path,
    random_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
    target: str,
    says_family: bool,
) -> None:
    """Not by hundreds of modules that the base lacks: by what it is, and what to do."""
    layers = random_adapter(sdxl_folder, every=9)
    path = write_adapter(tmp_path / "xl", AdapterFile(layers, AdapterMetadata("sdxl")), target)
    if not says_family:  # a second text encoder, or the width of the prompt, tells
        for file in [path] if path.is_file() else path.rglob("*.safetensors"):
            facts = {k: v for k, v in read_header(file).metadata.items() if k == "format"}
            facts |= {"dora_diffusion.component": file.parent.name} if target == "peft" else {}
            save_file(load_file(file), file, facts)
    adapter, base, output = str(path), str(sd1_folder), str(tmp_path / "out.safetensors")
    commands = [
        ["export", "--adapter", adapter, "--base", base, "--output", output],
        ["verify", str(sd1_folder), "--adapter", adapter, "--base", base],
        ["convert", adapter, output, "--to", "kohya", "--base", base],
        ["generate", "--adapter", adapter, "--base", base, "--prompt", "x", "--output", "x.png"],
    ]
    expected = (
        "this adapter was made for Stable Diffusion XL (sdxl), the base is Stable Diffusion 1 "
        "(sd1): use it with a base model of its family, or train it again on this one"
    )
    for command in commands:
        assert main(command) == 1, command
        error = capsys.readouterr().err
        assert expected in error
        assert len(error.splitlines()) == 1
    assert main(["inspect", adapter, "--base", base]) == 0
    fits = capsys.readouterr().out.partition("fits ")[2]
    assert " ".join(fits.split()).startswith(f"no: {expected}")
    assert not Path(output).exists()
