"""An adapter from two models: what it holds, what is said of the rest, and who reads it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.export import (
    ExportError,
    export_checkpoint,
    extract_adapter,
    inspect_adapter,
)
from dora_diffusion.export.fitting import FitSettings
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.models import PipelineFolder
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import Strengths
from tests.export.helpers import MakeAdapter, tensors_of

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def tuned_copy(base: Path, folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of a model folder whose UNet tensors are changed."""
    shutil.copytree(base, folder)
    tensors = {name: change(name, t) for name, t in load_file(base / UNET_FILE).items()}
    save_file(tensors, folder / UNET_FILE, {"format": "pt"})
    return folder


def noisy(name: str, tensor: Tensor) -> Tensor:
    """Every matrix with a change of full rank, a tenth of it."""
    if tensor.ndim < 2:
        return tensor
    draw = torch.Generator().manual_seed(len(name))
    return tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=draw)


def noisy_in_part(name: str, tensor: Tensor) -> Tensor:
    """The same for some layers of each kind."""
    return (
        noisy(name, tensor) if re.search("conv_in|mid_block.*to_q|downsamplers", name) else tensor
    )


@pytest.mark.parametrize(
    ("family", "layout", "axis"), [("sd1", "folder", "input"), ("sdxl", "file", "output")]
)
def test_what_was_exported_is_extracted_again(
    tmp_path: Path, family: str, layout: str, axis: str, random_adapter: MakeAdapter,
    deep: Callable[[str], Path],
) -> None:  # fmt: skip
    """All kinds of layers of UNet and text encoders, with ranks 2 to 4; SD1 from the file, too."""
    base = deep(family)
    layers = random_adapter(base, axis=axis, mixed_ranks=True, every=3)
    adapter = write_adapter(tmp_path / "a", AdapterFile(layers, AdapterMetadata(family)), "kohya")
    name = "tuned.safetensors" if layout == "file" else "tuned"
    tuned = export_checkpoint(base, adapter, tmp_path / name, dtype=torch.float32)
    before, total = base, 0
    if family == "sd1":  # the other way round: the base is one file, the tuned model a folder
        before = export_checkpoint(base, [(adapter, 0.0)], tmp_path / "base.safetensors")
    steps: list[tuple[int, int]] = []
    report = extract_adapter(
        before, tuned, tmp_path / "found.safetensors", FitSettings(4, norm_axis=axis),
        on_progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    found = read_adapter(report.path).layers
    assert found.keys() == layers.keys() == report.errors.keys()
    with PipelineFolder.open(base) as pipeline:
        for name, layer in found.items():
            wanted = merge_tensor(pipeline[f"{name}.weight"], [(layers[name], Strengths())])
            got = merge_tensor(pipeline[f"{name}.weight"], [(layer, Strengths())])
            assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
            assert layer.norm_axis == axis
        total = sum(
            spec.nbytes
            for name, spec in pipeline.specs.items()
            if name.endswith(".weight") and len(spec.shape) in (2, 4) and "vae." not in name
            and "_embedding." not in name.replace("time_embedding", "").replace("add_embedding", "")
        )  # fmt: skip
    assert report.total_error < 1e-5
    assert steps[-1] == (total, total)


def test_a_lora_is_the_truncated_svd_of_the_difference(tmp_path: Path, sd1_folder: Path) -> None:
    """Its error and its rank, in every layer, by NumPy in float64; by energy, too."""
    tuned = tuned_copy(sd1_folder, tmp_path / "tuned", noisy)
    before, after = tensors_of(sd1_folder), tensors_of(tuned)
    for energy in (None, 0.6):
        output = tmp_path / f"{energy}.safetensors"
        report = extract_adapter(
            sd1_folder,
            tuned,
            output,
            FitSettings(rank=3, method="lora", energy=energy),
            key_format="kohya",
        )
        layers, squared = read_adapter(output).layers, np.zeros(2)
        assert layers.keys() == report.errors.keys()
        assert len(layers) > 50
        for name, layer in layers.items():
            base, wanted = (
                w[f"{name}.weight"].double().flatten(1).numpy() for w in (before, after)
            )
            s = np.linalg.svd(wanted - base, compute_uv=False)
            held = np.cumsum(s**2) / np.sum(s**2)
            rank = 3 if energy is None else min(3, int(np.sum(held < energy)) + 1)
            assert (layer.rank, layer.magnitude) == (min(rank, len(s)), None), name
            up, down = (factor.flatten(1).double().numpy() for factor in (layer.up, layer.down))
            off = np.linalg.norm(wanted - base - layer.scale * up @ down)
            left = np.linalg.norm(s[rank:])
            assert off == pytest.approx(left, rel=1e-6), name
            assert report.errors[name] == pytest.approx(left / np.linalg.norm(s), abs=2e-6), name
            squared += left**2, np.sum(s**2)
        assert report.total_error == pytest.approx(np.sqrt(squared[0] / squared[1]), abs=2e-6)


def test_metadata_say_what_it_is_and_where_it_is_from(
    tmp_path: Path, sdxl_folder: Path, sd1_folder: Path
) -> None:
    tuned = tuned_copy(sdxl_folder, tmp_path / "my tuned", noisy_in_part)
    report = extract_adapter(sdxl_folder, tuned, tmp_path / "out", FitSettings(rank=2, energy=0.5))
    assert report.path == tmp_path / "out" / "pytorch_lora_weights.safetensors"
    facts = inspect_adapter(report.path, sdxl_folder)
    assert facts.metadata.family == "sdxl"
    assert facts.metadata.base_model == sdxl_folder.name
    assert facts.metadata.extra["extracted_from"] == "my tuned"
    assert facts.metadata.extra["approximation"] == "nearest DoRA, output axis, rank 2, energy 0.5"
    assert facts.metadata.extra["prediction_type"] == "epsilon"
    assert facts.fits.startswith("yes")
    assert (facts.method, facts.norm_axis) == ("DoRA", "output")
    assert str(tmp_path).encode() not in report.path.read_bytes()
    on_input = extract_adapter(
        sdxl_folder,
        tuned,
        tmp_path / "out",
        FitSettings(rank=2, norm_axis="input", dtype=torch.float16),
    )
    assert on_input.path.name == "adapter_kohya.safetensors"
    tensors = load_file(on_input.path)
    kinds = {key.rpartition(".")[2]: tensor.dtype for key, tensor in tensors.items()}
    assert (kinds["weight"], kinds["dora_scale"]) == (torch.float16, torch.float32)
    # Names of an SDXL UNet depend on its layout, which the file must hold.
    assert read_adapter(on_input.path).layers.keys() == report.errors.keys()


def test_what_no_adapter_holds_is_said(tmp_path: Path, sd1_folder: Path) -> None:
    def change(name: str, tensor: Tensor) -> Tensor:
        is_changed = name in ("conv_in.weight", "conv_in.bias", "conv_norm_out.weight")
        return tensor + 0.1 if is_changed else tensor

    tuned = tuned_copy(sd1_folder, tmp_path / "tuned", change)
    path = tuned / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: t * 2 for k, t in load_file(path).items()}, path, {"format": "pt"})
    report = extract_adapter(sd1_folder, tuned, tmp_path / "out", FitSettings(rank=2))
    assert list(report.errors) == ["unet.conv_in"]
    unchanged, others, vae = report.notes
    assert unchanged.startswith("no adapter for ")
    assert unchanged.endswith(" layers without a difference")
    assert others == (
        "2 other tensors differ, which no adapter can represent (biases, norms, embeddings): "
        "unet.conv_in.bias, unet.conv_norm_out.weight"
    )
    assert vae.startswith("the VAE differs, which no adapter can represent; a merged model can")


@pytest.mark.parametrize("narrow", ["base", "tuned"])
def test_rounding_to_half_precision_is_no_difference(
    tmp_path: Path, sd1_folder: Path, narrow: str
) -> None:
    def change(name: str, tensor: Tensor) -> Tensor:
        return tensor + 0.1 if name == "conv_in.weight" else tensor

    def to_half(name: str, tensor: Tensor) -> Tensor:
        return change(name, tensor).half() if narrow == "tuned" else tensor.half()

    wide = sd1_folder
    if narrow == "base":
        wide = tuned_copy(sd1_folder, tmp_path / "wide", change)
    half = tuned_copy(sd1_folder, tmp_path / "half", to_half)
    base, tuned = (half, wide) if narrow == "base" else (wide, half)
    report = extract_adapter(base, tuned, tmp_path / "out", FitSettings(rank=2))
    assert list(report.errors) == ["unet.conv_in"]


def test_refusals_say_what_to_do(tmp_path: Path, sd1_folder: Path, sd2_folder: Path) -> None:
    output = tmp_path / "out.safetensors"
    tuned = tuned_copy(sd1_folder, tmp_path / "tuned", noisy_in_part)
    wide = {"conv_in.weight": (32, 9, 3, 3)}
    inpaints = tuned_copy(
        sd1_folder, tmp_path / "inpaints", lambda n, t: torch.zeros(wide.get(n, t.shape))
    )
    broken = tuned_copy(sd1_folder, tmp_path / "broken", lambda n, t: t / 0)
    for other, reason in (
        (sd1_folder, "nothing to extract"),
        (sd2_folder, r"the base is Stable Diffusion 1 \(sd1\), sd2 is Stable Diffusion 2"),
        (
            inpaints,
            r"inpaints is not a tuned sd1.*: unet.conv_in \(32, 9, 3, 3\) for \(32, 4, 3, 3\)",
        ),
        (broken, "numbers that are not finite"),
    ):
        with pytest.raises(ExportError, match=reason):
            extract_adapter(sd1_folder, other, output, FitSettings(rank=2))
    for fit, key_format, reason in (
        (FitSettings(), None, "rank is None; give the largest rank"),
        (FitSettings(2), "dense", "unknown key format 'dense'; there is diffusers, peft, kohya"),
        (FitSettings(2, norm_axis="input"), "peft", "cannot store magnitudes on the input axis"),
    ):
        with pytest.raises(ExportError, match=reason):
            extract_adapter(sd1_folder, tuned, output, fit, key_format=key_format)
    assert not output.exists()
    extract_adapter(sd1_folder, tuned, output, FitSettings(rank=1))
    with pytest.raises(ExportError, match="exists"):
        extract_adapter(sd1_folder, tuned, output, FitSettings(rank=1))
    with pytest.raises(ExportError, match="pickles are not written"):
        extract_adapter(sd1_folder, tuned, tmp_path / "a.pt", FitSettings(rank=1))
