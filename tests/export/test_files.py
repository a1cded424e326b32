"""Outputs that exist, are read, or are interrupted."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import ExportError, export_checkpoint, files
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    write_adapter,
)
from tests.export.helpers import MakeAdapter, tensors_of


def test_existing_outputs_are_kept_unless_asked(
    sd1_folder: Path, tmp_path: Path, random_adapter: MakeAdapter
) -> None:
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    output = tmp_path / "merged"
    export_checkpoint(sd1_folder, file, output)
    with pytest.raises(ExportError, match="exists; choose another name"):
        export_checkpoint(sd1_folder, file, output)
    before = tensors_of(output)
    export_checkpoint(sd1_folder, file, output, strength=0.0, overwrite=True)
    after, base = tensors_of(output), tensors_of(sd1_folder)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(base[name], after[name]) for name in base)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "dog.jpg").write_bytes(b"precious")
    with pytest.raises(ExportError, match="not a model"):
        export_checkpoint(sd1_folder, file, photos, overwrite=True)
    with pytest.raises(ExportError, match="contains the other"):
        export_checkpoint(sd1_folder, file, sd1_folder / "unet" / "merged.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "merged", "photos"]


def test_what_is_read_is_not_overwritten(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = random_adapter(sd1_folder, every=20)
    file = write_adapter(tmp_path / "a.safetensors", AdapterFile(layers))
    merged = export_checkpoint(sd1_folder, file, tmp_path / "merged")
    inside = write_adapter(merged / "lora.safetensors", AdapterFile(layers))
    peft = write_adapter(tmp_path / "peft", AdapterFile(layers), "peft")
    single = export_checkpoint(sd1_folder, file, tmp_path / "single.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for base, adapter, target, vae in (
        (sd1_folder, file, file, None),
        (sd1_folder, inside, merged, None),
        (sd1_folder, peft, peft / "unet" / "adapter_model.safetensors", None),
        (merged, file, merged, None),
        (single, file, single, None),
        (sd1_folder, file, merged, merged / "vae"),
        (sd1_folder, file, single, single),
    ):
        with pytest.raises(ExportError, match="contains the input"):
            export_checkpoint(BaseModel(base, vae=vae), adapter, target, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("calls", [1, 2])
def test_an_interruption_puts_the_old_folder_back(
    tmp_path: Path, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch, random_adapter: MakeAdapter,
    calls: int,
) -> None:  # fmt: skip
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    merged = export_checkpoint(sd1_folder, file, tmp_path / "merged")
    (merged / "mine.txt").write_text("of the old folder", encoding="utf-8")
    done = 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal done
        done += 1
        if done == 2:
            raise KeyboardInterrupt
        os.replace(source, target)
        if done == calls == 1:
            done += 1
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "system", SimpleNamespace(replace=interrupted))
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(sd1_folder, file, merged, strength=0.5, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "merged"]
    assert (merged / "mine.txt").read_text(encoding="utf-8") == "of the old folder"
