"""Models that are opened as a base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
from dora_diffusion.sampling.load import load_adapted
from tests.export.helpers import MakeAdapter, assert_equal


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


@pytest.fixture(scope="module")
def two_variants(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path) -> tuple[Path, Path]:
    """A base with weights of a variant that differ from the plain ones; one that has them alone."""
    folder = tmp_path_factory.mktemp("variants")
    both, alone = (shutil.copytree(sd1_folder, folder / name) for name in ("both", "alone"))
    for path in list(alone.rglob("*.safetensors")):
        tensors = load_file(path)
        draw = torch.Generator().manual_seed(len(tensors))
        other = {
            name: t + 0.3 * t.std() * torch.randn(t.shape, generator=draw) if t.ndim > 1 else t
            for name, t in tensors.items()
        }
        save_file(other, path, {"format": "pt"})
        place = both / path.parent.name / f"{path.stem}.other.safetensors"
        save_file(other, place, {"format": "pt"})
    return both, alone


@pytest.mark.parametrize(
    "way", ["dense", "lora", "smaller-rank", "extract", "tuned", "combine", "inspect"]
)
def test_what_is_computed_from_a_base_is_of_its_variant(
    tmp_path: Path, sd1_folder: Path, two_variants: tuple[Path, Path], way: str,
    random_adapter: MakeAdapter,
) -> None:  # fmt: skip
    both, alone = two_variants
    layers = random_adapter(sd1_folder, every=25)
    facts = AdapterMetadata("sd1")
    source = write_adapter(tmp_path / "a.safetensors", AdapterFile(layers, facts))

    def made(base: Path, variant: str | None) -> dict[str, Tensor]:
        output = tmp_path / f"{base.name}-{variant}.safetensors"
        if way == "inspect":
            return {inspect_adapter(source, BaseModel(base, variant)).fits: torch.zeros(0)}
        if way == "extract":
            extract_adapter(
                BaseModel(base, variant), sd1_folder, output, FitSettings(rank=1, energy=0.01)
            )
        elif way == "tuned":
            extract_adapter(
                sd1_folder, BaseModel(base, variant), output, FitSettings(rank=1, energy=0.01)
            )
        elif way == "combine":
            combine_adapters(BaseModel(base, variant), source, output, FitSettings(rank=1))
        else:
            rank = None if way == "dense" else 1
            convert_adapter(
                source, output, way, FitSettings(rank=rank), base=BaseModel(base, variant)
            )
        return load_file(output)

    wanted = made(alone, None)
    assert_equal(made(both, "other"), wanted)
    # Of the plain weights there is no difference to extract, and the fit is as good.
    if way not in ("extract", "tuned", "inspect"):
        plain = made(both, None)
        assert any(not torch.equal(tensor, plain[name]) for name, tensor in wanted.items())
    with pytest.raises(TensorFileError, match="no weights of the variant 'nope'"):
        made(both, "nope")


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
    load_adapted(base, file, device="cpu")
    assert asked == 8 * [("someone/model", "v2")]
