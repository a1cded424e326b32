"""Models that are opened as a base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dora_diffusion.export import (
    ExportError,
    export_checkpoint,
)
from dora_diffusion.formats.adapter.file import AdapterFile, write_adapter
from dora_diffusion.formats.files.stream import TensorFileError
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
