"""Models that are opened as a base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import (
    ExportError,
    combine_adapters,
    convert_adapter,
    export_checkpoint,
    extract_adapter,
    inspect_adapter,
    verify_checkpoint,
)
from dora_diffusion.export.fit import FitSettings
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.formats.files.stream import TensorFileError
from dora_diffusion.lab.analysis import analyze_weights
from dora_diffusion.sampling.load import load_adapted
from tests.export.helpers import MakeAdapter


def test_pickled_bases_are_refused(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sd1_folder, every=9))
    )
    for name in ("model.ckpt", "model.pt", "model.bin"):
        with pytest.raises(ExportError, match=rf"{name} is a pickle"):
            export_checkpoint(tmp_path / name, path, tmp_path / "m")
    base = tmp_path / "base"
    shutil.copytree(sd1_folder, base)
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(TensorFileError, match=r"as a pickle \(diffusion_pytorch_model.bin\)"):
        export_checkpoint(base, path, tmp_path / "m")


def test_a_revision_is_asked_of_the_hub(
    sd1_folder: Path, tmp_path: Path, random_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(name: str, **options: object) -> str:
        asked.append((name, options["revision"]))
        return str(sd1_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    layers = random_adapter(sd1_folder, every=40)
    file = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata("sd1")))
    base = BaseModel("someone/model", revision="v2")
    convert_adapter(file, tmp_path / "b.safetensors", "dense", base=base)
    combine_adapters(base, file, tmp_path / "c.safetensors")
    inspect_adapter(file, base)
    merged = export_checkpoint(base, file, tmp_path / "merged")
    assert verify_checkpoint(merged, base, file).ok
    extract_adapter(base, merged, tmp_path / "d.safetensors", FitSettings(rank=1))
    extract_adapter(merged, base, tmp_path / "e.safetensors", FitSettings(rank=1))
    analyze_weights(file, base)
    load_adapted(base, file, device="cpu")
    assert asked == 9 * [("someone/model", "v2")]
