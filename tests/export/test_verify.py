"""Merged models are proven, and one wrong number is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_diffusion.cli.main import main
from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import export_checkpoint, verify_checkpoint
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.numerics.weights import MergeError
from tests.export.helpers import MakeAdapter, tensors_of


def test_verify_finds_the_merged_model_behind_the_adapters(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adapters = [
        str(
            write_adapter(tmp_path / name, AdapterFile(random_adapter(sd1_folder, every=9, seed=i)))
        )
        for i, name in enumerate("ab")
    ]
    merged = str(tmp_path / "m.safetensors")
    export_checkpoint(sd1_folder, [(path, 1.0) for path in adapters], merged)
    base = ["--base", str(sd1_folder)]
    repeated = ["--adapter", adapters[0], "--adapter", adapters[1]]
    for command in (
        [merged, *base, "--adapter", *adapters],
        [*base, "--adapter", *adapters, merged],
        [*base, *repeated, merged],
        [merged, *base, *repeated],
        ["--adapter", *adapters, *base, merged],
    ):
        assert main(["verify", *command]) == 0, command
        assert capsys.readouterr().out.splitlines()[-1] == "verified"
    assert main(["verify", *base, "--adapter", adapters[0]]) == 1
    assert "the merged model is missing: 'dora-diffusion verify MERGED" in capsys.readouterr().err
    assert main(["verify", *base, "--adapter", *adapters]) == 1
    assert "an adapter" in capsys.readouterr().err.splitlines()[-1]
    exported = tmp_path / "n.safetensors"
    assert main(["export", *base, *repeated, "--output", str(exported)]) == 0
    assert verify_checkpoint(exported, sd1_folder, [(path, 1.0) for path in adapters]).ok


def files_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_way_from_base_to_output_is_proven(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> None:
    """Folder or single file in, folder or single file out: all hold the same merge."""
    folder = request.getfixturevalue("shallow" if family == "sd1" else "deep")(family)
    layers = random_adapter(folder, every=3, axis="input" if family == "sd2" else "output")
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata(family)), "kohya"
    )
    single = export_checkpoint(folder, path, tmp_path / "base.safetensors", strength=0.0)
    outputs = [
        export_checkpoint(
            BaseModel(base, model_config=folder), path, tmp_path / f"{i}{suffix}", strength=0.7
        )
        for i, base in enumerate((folder, single))
        for suffix in ("", ".safetensors")
    ]
    assert files_in(outputs[2]) == files_in(folder) | {Path("README.md")}
    first, other = tensors_of(outputs[0]), tensors_of(outputs[2])
    assert first.keys() == other.keys()
    assert all(torch.equal(first[name], other[name]) for name in first)
    for output, base in zip(outputs, (single, folder) * 2, strict=True):
        report = verify_checkpoint(output, base, path, strength=0.7)
        assert report.ok, report.problems
        assert sum(one.tensors for one in report.kinds.values()) == len(layers)
        assert max(one.largest for one in report.kinds.values()) < 1e-6
        kinds = {"unet Linear", "unet Conv2d 3x3", "unet Conv2d 1x1", "text_encoder Linear"}
        assert set(report.kinds) >= kinds
    report = verify_checkpoint(outputs[0], folder, path)
    assert not report.ok
    assert "other strengths: strength 0.7" in report.problems[-1]


def test_half_precision_is_proven_up_to_its_rounding(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    path = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=4)))
    for dtype in (torch.float16, torch.bfloat16):
        output = export_checkpoint(
            sd1_folder, path, tmp_path / "m.safetensors", dtype=dtype, overwrite=True
        )
        report = verify_checkpoint(output, sd1_folder, path)
        assert report.ok, report.problems
        half = torch.finfo(dtype).eps / 2
        for one in report.kinds.values():
            assert half / 20 < one.largest <= one.allowed < 1.1 * half


@pytest.mark.parametrize("part", ["adapted", "unadapted"])
def test_one_wrong_number_is_found(
    tmp_path: Path,
    sd1_folder: Path,
    random_adapter: MakeAdapter,
    capsys: pytest.CaptureFixture[str],
    part: str,
) -> None:
    layers = random_adapter(sd1_folder, every=4)
    path = write_adapter(tmp_path / "a.safetensors", AdapterFile(layers))
    output = export_checkpoint(sd1_folder, path, tmp_path / "merged")
    command = ["verify", str(output), "--base", str(sd1_folder), "--adapter", str(path)]
    assert main(command) == 0
    assert "verified" in capsys.readouterr().out
    file = output / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    adapted = [name.removeprefix("unet.") for name in layers if name.startswith("unet.")]
    name = f"{adapted[3]}.weight" if part == "adapted" else f"{adapted[3]}.bias"
    if name not in tensors:
        name = "conv_norm_out.bias"
    tensors[name].view(-1)[7] += 1e-3 * tensors[name].abs().max()
    save_file(tensors, file)
    assert main(command) == 1
    out = capsys.readouterr().out
    assert name in out
    assert "NOT what" in out
    assert ("times the rounding" if part == "adapted" else "not adapted, but differs") in out


def test_missing_tensors_and_other_adapters_are_found(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    paths = [
        write_adapter(tmp_path / f"{i}.safetensors", AdapterFile(random_adapter(
            sd1_folder, every=9, seed=i)))
        for i in range(2)
    ]  # fmt: skip
    output = export_checkpoint(sd1_folder, paths[0], tmp_path / "merged.safetensors")
    report = verify_checkpoint(output, sd1_folder, [(paths[1], 1.0)])
    assert "other adapters than these" in report.problems[-1]
    tensors = load_file(output)
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, output)
    report = verify_checkpoint(output, sd1_folder, paths[0])
    assert report.problems == ["unet.conv_out.bias is not in the merged model"]


def exported(folder: Path, base: Path, make: MakeAdapter) -> tuple[Path, Path]:
    """An adapter and a single file with it merged in."""
    adapter = write_adapter(folder / "a.safetensors", AdapterFile(make(base, every=20)))
    return adapter, export_checkpoint(base, adapter, folder / "merged.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_names_that_programs_do_not_find(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> None:
    base = request.getfixturevalue(f"{family}_folder")
    path, merged = exported(tmp_path, base, random_adapter)
    tensors = {
        key.replace("transformer.text_model.", "transformer."): tensor
        for key, tensor in load_file(merged).items()
    }
    renamed = sum(".transformer.encoder." in key for key in tensors)
    assert renamed > 10
    save_file(tensors, merged)
    problems = verify_checkpoint(merged, base, path).problems
    assert sum("should be called" in problem for problem in problems) > renamed
    assert all("most programs do not find it" in problem for problem in problems)


def test_another_schedule_is_found(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter
) -> None:
    """A folder whose scheduler was changed, and a single file without its markers."""
    base = tmp_path / "base"
    shutil.copytree(sdxl_folder, base)
    scheduler = base / "scheduler" / "scheduler_config.json"
    values = json.loads(scheduler.read_text(encoding="utf-8"))
    v_prediction = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.write_text(json.dumps({**values, **v_prediction}), encoding="utf-8")
    path, merged = exported(tmp_path, base, random_adapter)
    assert verify_checkpoint(merged, base, path).ok
    tensors = load_file(merged)
    del tensors["v_pred"], tensors["ztsnr"]
    save_file(tensors, merged)
    assert set(verify_checkpoint(merged, base, path).problems) == {
        "the base is marked as v_pred, it is not",
        "the base is marked as ztsnr, it is not",
    }
    folder = export_checkpoint(sdxl_folder, path, tmp_path / "folder")
    shutil.copy(scheduler, folder / "scheduler" / "scheduler_config.json")
    assert verify_checkpoint(folder, sdxl_folder, path).problems == [
        "its prediction_type is v_prediction, the base's is epsilon",
        "its rescale_betas_zero_snr is True, the base's is False",
    ]


def test_numbers_that_half_precision_does_not_hold(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """In a weight that no adapter acts on: not written, and found in another program's file."""
    base = tmp_path / "base"
    shutil.copytree(sd1_folder, base)
    file = base / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("layers.1.mlp.fc1.bias"))
    tensors[key][3] = 1e5
    save_file(tensors, file, {"format": "pt"})
    path = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    with pytest.raises(
        MergeError, match=r"layers\.1\.mlp\.fc1\.bias: .* beyond the range of float16"
    ):
        export_checkpoint(base, path, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()
    output = export_checkpoint(base, path, tmp_path / "full")
    assert verify_checkpoint(output, base, path).ok
    file = output / "text_encoder" / "model.safetensors"
    save_file({k: t.half() for k, t in load_file(file).items()}, file, {"format": "pt"})
    (problem,) = verify_checkpoint(output, base, path).problems
    assert problem.endswith("layers.1.mlp.fc1.bias is not finite, but the base's is")
    wide = export_checkpoint(base, path, tmp_path / "wide", dtype=torch.bfloat16)
    assert verify_checkpoint(wide, base, path).ok
