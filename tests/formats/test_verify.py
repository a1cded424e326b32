"""Exports in all their ways, and the proof of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.cli import main
from dora_diffusion.export import ExportError, export_checkpoint, verify_checkpoint
from dora_diffusion.export.recipe import file_hash
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.formats.files.stream import TensorFileError, TensorReader, read_header
from dora_diffusion.merge import MergeError, Strengths, merge_tensor
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with PipelineFolder.open(folder) as pipeline:
        return {name: pipeline[name] for name in pipeline.specs}


def files_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_way_from_base_to_output_is_proven(
    tmp_path: Path, family: str, request: pytest.FixtureRequest, random_adapter: MakeAdapter
) -> None:
    """Folder or single file in, folder or single file out: all hold the same merge."""
    folder = request.getfixturevalue(f"{family}_folder")
    layers = random_adapter(folder, every=3, axis="input" if family == "sd2" else "output")
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(layers, AdapterMetadata(family)), "kohya"
    )
    single = export_checkpoint(folder, path, tmp_path / "base.safetensors", strength=0.0)
    outputs = [
        export_checkpoint(base, path, tmp_path / f"{i}{suffix}", strength=0.7, config=folder)
        for i, base in enumerate((folder, single))
        for suffix in ("", ".safetensors")
    ]
    assert files_in(outputs[2]) == files_in(folder) | {Path("README.md")}
    first, other = tensors_of(outputs[0]), tensors_of(outputs[2])
    assert first.keys() == other.keys()
    assert all(torch.equal(first[name], other[name]) for name in first)
    for output in outputs:
        for base in (folder, single):
            report = verify_checkpoint(output, base, path, strength=0.7)
            assert report.ok, report.problems
            assert sum(one.tensors for one in report.kinds.values()) == len(layers)
            assert max(one.largest for one in report.kinds.values()) < 1e-6
            kinds = {"unet Linear", "unet Conv2d 3x3", "unet Conv2d 1x1", "text_encoder Linear"}
            assert set(report.kinds) >= kinds
        report = verify_checkpoint(output, folder, path)
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
    assert "proven" in capsys.readouterr().out
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
    assert "from other adapters" in report.problems[-1]
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


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("v_pred", "it is marked as v_pred, the base is not"),
        ("ztsnr", "it is marked as ztsnr, the base is not"),
        ("model.diffusion_model.extra.weight", "extra.weight is not in the base"),
        ("model_ema.diffusion_modelout2bias", "it holds averaged copies"),
    ],
)
def test_tensors_that_the_base_lacks(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter, key: str, problem: str
) -> None:
    path, merged = exported(tmp_path, sdxl_folder, random_adapter)
    single = export_checkpoint(sdxl_folder, path, tmp_path / "base.safetensors", strength=0.0)
    harmless = "first_stage_model.loss.logvar"
    save_file({**load_file(merged), key: torch.ones(1), harmless: torch.ones(1)}, merged)
    (found,) = verify_checkpoint(merged, sdxl_folder, path).problems[:1]
    assert problem in found
    problems = verify_checkpoint(merged, single, path).problems
    assert any(problem in one for one in problems)
    assert f"{harmless} is not in the base" in problems


def test_another_schedule_is_found(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter
) -> None:
    """A folder whose scheduler was changed, and a single file without its markers."""
    base = tmp_path / "base"
    shutil.copytree(sdxl_folder, base)
    scheduler = base / "scheduler" / "scheduler_config.json"
    values = json.loads(scheduler.read_text())
    v_prediction = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.write_text(json.dumps({**values, **v_prediction}))
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
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.fc1\.bias: .* beyond float16; take"):
        export_checkpoint(base, path, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()
    output = export_checkpoint(base, path, tmp_path / "full")
    assert verify_checkpoint(output, base, path).ok
    file = output / "text_encoder" / "model.safetensors"
    save_file({k: t.half() for k, t in load_file(file).items()}, file, {"format": "pt"})
    (problem,) = verify_checkpoint(output, base, path).problems
    assert problem.endswith("layers.1.mlp.fc1.bias is not finite, and the base's is")
    wide = export_checkpoint(base, path, tmp_path / "wide", dtype=torch.bfloat16)
    assert verify_checkpoint(wide, base, path).ok


def test_a_merge_in_another_order_is_proven_where_terms_nearly_cancel(
    tmp_path: Path, sd1_folder: Path
) -> None:
    """A thousandth of the terms is left, and float32 rounds the terms."""
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = tensors_of(sd1_folder)[f"{name}.weight"]
    u, s, v = torch.linalg.svd(-0.999 * weight.double())
    down, up = (s.sqrt()[:, None] * v).float(), (u * s.sqrt()).float()
    magnitude = weight.norm(dim=1) * 1.1
    layer = LayerWeights(down, up, magnitude, float(len(s)))
    path = write_adapter(tmp_path / "a.safetensors", AdapterFile({name: layer}))
    output = export_checkpoint(sd1_folder, path, tmp_path / "merged")
    direction = weight.double() + up.double() @ down.double()
    exact = magnitude.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
    file = output / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    key = f"{name.removeprefix('unet.')}.weight"
    difference = (state[key] - exact).abs().max() / exact.abs().max()
    assert difference > 16 * torch.finfo(torch.float32).eps
    save_file(state | {key: exact.float()}, file, {"format": "pt"})
    assert verify_checkpoint(output, sd1_folder, path).problems == []
    save_file(state | {key: 1.1 * exact.float()}, file, {"format": "pt"})
    assert len(verify_checkpoint(output, sd1_folder, path).problems) == 1


def test_strength_per_component_and_several_adapters(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter
) -> None:
    layers = [random_adapter(sdxl_folder, every=5, seed=seed) for seed in range(2)]
    paths = [
        write_adapter(tmp_path / f"{i}.safetensors", AdapterFile(one))
        for i, one in enumerate(layers)
    ]
    options = {
        "strength": 0.9, "unet_strength": 0.5, "text_encoder_strength": 0.0,
        "direction_strength": 0.8, "magnitude_strength": 1.2,
    }  # fmt: skip
    adapters = [(paths[0], 1.0), (paths[1], 0.25)]
    output = export_checkpoint(sdxl_folder, adapters, tmp_path / "merged", **options)
    base, merged = tensors_of(sdxl_folder), tensors_of(output)
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if name.startswith("unet.") and module in layers[0] and name.endswith(".weight"):
            each = [
                (one[module], Strengths(own * 0.45, 0.8, 1.2))
                for one, (_, own) in zip(layers, adapters, strict=True)
                if module in one
            ]
            torch.testing.assert_close(
                merged[name], merge_tensor(weight, each), rtol=0, atol=1e-6, msg=name
            )
            assert not torch.equal(merged[name], weight)
        else:
            assert torch.equal(merged[name], weight), name
    assert verify_checkpoint(output, sdxl_folder, adapters, **options).ok
    with pytest.raises(ExportError, match="finite numbers, got unet_strength nan"):
        export_checkpoint(sdxl_folder, paths[0], tmp_path / "x", unet_strength=float("nan"))


@pytest.mark.parametrize("form", ["folder", "model", "checkpoint", "original", "early"])
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_another_vae_is_baked_in(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, form: str, suffix: str
) -> None:
    """From every form that autoencoders come in."""
    other = tmp_path / "other"
    shutil.copytree(sd1_folder, other)
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: (2 * t).half() for name, t in load_file(file).items()}, file)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sd1_folder, every=9))
    )
    vae = {"folder": other / "vae", "model": other}.get(form, tmp_path / "vae.safetensors")
    whole = load_file(export_checkpoint(other, path, tmp_path / "o.safetensors", strength=0))
    if form == "checkpoint":
        save_file(whole, vae)
    elif form == "original":
        prefix = "first_stage_model."
        part = {k.removeprefix(prefix): t for k, t in whole.items() if k.startswith(prefix)}
        save_file({**part, "loss.logvar": torch.zeros(1)}, vae)
    elif form == "early":
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = load_file(file)
        for new, old in names.items():
            tensors = {
                k.replace(f".attentions.0.{new}.", f".attentions.0.{old}."): t
                for k, t in tensors.items()
            }
        assert any(".query." in key for key in tensors)
        save_file(tensors, vae)
    output = export_checkpoint(sd1_folder, path, tmp_path / f"merged{suffix}", vae=vae)
    report = verify_checkpoint(output, sd1_folder, path, vae=vae)
    assert report.ok, report.problems
    assert not verify_checkpoint(output, sd1_folder, path).ok
    if not suffix:
        wanted, found = tensors_of(other), tensors_of(output)
        names = [name for name in wanted if name.startswith("vae.")]
        assert all(torch.equal(wanted[name], found[name]) for name in names)
        if form in ("folder", "model"):
            assert json.loads((output / "vae" / "config.json").read_text())["scaling_factor"] == 0.5


def test_what_is_not_a_fitting_vae_is_refused(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sd1_folder, every=9))
    )
    with pytest.raises(ExportError, match="not an autoencoder"):
        export_checkpoint(sd1_folder, path, tmp_path / "m", vae=path)
    part = load_file(sd1_folder / "vae" / "diffusion_pytorch_model.safetensors")
    part.pop("quant_conv.bias")
    save_file(part, tmp_path / "v.safetensors")
    with pytest.raises(ExportError, match=r"another kind than the base's: vae\.quant_conv\.bias"):
        export_checkpoint(sd1_folder, path, tmp_path / "m", vae=tmp_path / "v.safetensors")
    with pytest.raises(ExportError, match="is a pickle"):
        export_checkpoint(sd1_folder, path, tmp_path / "m", vae="vae.pt")
    assert not (tmp_path / "m").exists()


def test_a_single_file_says_what_is_inside(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter
) -> None:
    facts = AdapterMetadata("sdxl", trigger="sks dog")
    path = write_adapter(
        tmp_path / "my-dog.safetensors", AdapterFile(random_adapter(sdxl_folder, every=9), facts)
    )
    output = export_checkpoint(
        sdxl_folder, [(path, 0.5)], tmp_path / "dog-xl.safetensors", unet_strength=0.8
    )
    notes = read_header(output).metadata
    assert notes["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert notes["modelspec.sai_model_spec"] == "1.0.0"
    assert notes["modelspec.title"] == "dog-xl"
    assert notes["modelspec.trigger_phrase"] == "sks dog"
    assert notes["modelspec.prediction_type"] == "epsilon"
    assert json.loads(notes["dora_diffusion.merged"]) == [
        {
            "adapter": "my-dog.safetensors",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "strength": 0.5,
            "unet_strength": 0.8,
        }
    ]
    base = json.loads(notes["dora_diffusion.base"])
    assert base["name"] == sdxl_folder.name
    unet = sdxl_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert base["sha256"]["unet"] == hashlib.sha256(unet.read_bytes()).hexdigest()
    assert set(base["sha256"]) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert not any(str(tmp_path.parent) in value for value in notes.values())
    again = read_header(export_checkpoint(output, path, tmp_path / "two.safetensors")).metadata
    sha256 = hashlib.sha256(output.read_bytes()).hexdigest()
    assert json.loads(again["dora_diffusion.base"]) == {
        "name": "dog-xl.safetensors", "sha256": {"checkpoint": sha256}
    }  # fmt: skip


def test_the_hubs_name_of_a_file_is_its_hash(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"large")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert file_hash([tmp_path / "model.safetensors"]) == blob.name
    assert file_hash([blob, blob]) == hashlib.sha256(b"largelarge").hexdigest()


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


def test_a_folder_needs_the_right_configuration(
    tmp_path: Path, sd1_folder: Path, sd2_folder: Path, random_adapter: MakeAdapter
) -> None:
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sd1_folder, every=9))
    )
    single = export_checkpoint(sd1_folder, path, tmp_path / "base.safetensors")
    with pytest.raises(ExportError, match=r"of another model than base\.safetensors"):
        export_checkpoint(single, path, tmp_path / "m", config=sd2_folder)
    with pytest.raises(ValueError, match="give a diffusers folder of the same kind"):
        export_checkpoint(single, path, tmp_path / "m")
    tensors = {**load_file(single), "model.diffusion_model.extra.weight": torch.ones(2, 2)}
    save_file(tensors, single)
    with pytest.raises(ExportError, match=r"extra\.weight would be left out"):
        export_checkpoint(single, path, tmp_path / "m", config=sd1_folder)
    assert not (tmp_path / "m").exists()


def test_v_prediction_reaches_the_folder(
    tmp_path: Path, sdxl_folder: Path, random_adapter: MakeAdapter
) -> None:
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sdxl_folder, every=20))
    )
    single = export_checkpoint(sdxl_folder, path, tmp_path / "base.safetensors")
    save_file({**load_file(single), "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, single)
    output = export_checkpoint(single, path, tmp_path / "m", config=sdxl_folder)
    scheduler = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    again = export_checkpoint(output, path, tmp_path / "again.safetensors")
    with TensorReader(again) as reader:
        assert {"v_pred", "ztsnr"} <= reader.specs.keys()
        assert reader.metadata["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ({}, "the configuration's"),
    ],
)
def test_the_prediction_type_of_a_single_file_is_kept(
    tmp_path: Path, sd2_folder: Path, random_adapter: MakeAdapter, stated: dict[str, str],
    expected: str,
) -> None:  # fmt: skip
    """In the folder made from it, whatever the configuration says, and in another single file."""
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sd2_folder, every=20))
    )
    single = export_checkpoint(sd2_folder, path, tmp_path / "base.safetensors")
    hashes = {"modelspec.hash_sha256": "0xbeef", "sshs_model_hash": "beef"}
    save_file(load_file(single), single, {**stated, **hashes})
    for configured in ("epsilon", "v_prediction"):
        config = tmp_path / configured
        shutil.copytree(sd2_folder, config)
        scheduler = config / "scheduler" / "scheduler_config.json"
        values = json.loads(scheduler.read_text())
        scheduler.write_text(json.dumps({**values, "prediction_type": configured}))
        output = export_checkpoint(single, path, tmp_path / f"m-{configured}", config=config)
        written = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
        assert written["prediction_type"] == (expected if stated else configured)
    notes = read_header(export_checkpoint(single, path, tmp_path / "s.safetensors")).metadata
    assert not hashes.keys() & notes.keys()
    if stated:
        is_v = expected == "v_prediction"
        assert notes["modelspec.prediction_type"] == ("v" if is_v else "epsilon")
        assert notes["modelspec.architecture"].endswith("-768-v" if is_v else "-512")
    else:
        assert not {"modelspec.prediction_type", "modelspec.architecture"} & notes.keys()
        with pytest.raises(ExportError, match="does not say whether it predicts the noise or v"):
            export_checkpoint(single, path, tmp_path / "m")


def test_position_numbers_as_floats(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """Many merged models of Stable Diffusion 1 hold them so."""
    path = write_adapter(
        tmp_path / "a.safetensors", AdapterFile(random_adapter(sd1_folder, every=9))
    )
    single = export_checkpoint(sd1_folder, path, tmp_path / "base.safetensors", strength=0.0)
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    save_file({**load_file(single), key: torch.arange(77.0)[None]}, single)
    folder = export_checkpoint(single, path, tmp_path / "m", config=sd1_folder)
    expected = tensors_of(export_checkpoint(sd1_folder, path, tmp_path / "plain"))
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    again = export_checkpoint(single, path, tmp_path / "m.safetensors", dtype=torch.float16)
    positions = load_file(again)[key]
    assert positions.dtype == torch.int64
    assert torch.equal(positions, torch.arange(77)[None])
    assert verify_checkpoint(again, single, path).ok


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("prefix", ["", "text_model.text_model."])
def test_text_encoders_with_a_wrong_prefix(
    tmp_path: Path, family: str, prefix: str, request: pytest.FixtureRequest,
    random_adapter: MakeAdapter,
) -> None:  # fmt: skip
    """A base whose CLIP lacks `text_model.`, or has it twice: read, and written with it, once."""
    import diffusers

    folder = request.getfixturevalue(f"{family}_folder")
    path = write_adapter(tmp_path / "a", AdapterFile(random_adapter(folder, every=7)))
    good = export_checkpoint(folder, path, tmp_path / "good.safetensors", strength=0.0)
    tensors, place = load_file(good), {"sd1": "cond_stage_model", "sdxl": "conditioner.embedders.0"}
    right = f"{place[family]}.transformer.text_model."
    tensors[f"{right}embeddings.position_ids"] = torch.arange(77)[None]
    wrong = tmp_path / "wrong.safetensors"
    replaced = right.replace("text_model.", prefix)
    save_file({key.replace(right, replaced): t for key, t in tensors.items()}, wrong)
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    file = base / "text_encoder" / "model.safetensors"
    state = {key.removeprefix("text_model."): t for key, t in load_file(file).items()}
    save_file({prefix + key: t for key, t in state.items()}, file, {"format": "pt"})
    expected = load_file(export_checkpoint(folder, path, tmp_path / "expected.safetensors"))
    for number, source in enumerate((wrong, base)):
        output = export_checkpoint(source, path, tmp_path / f"{number}.safetensors")
        merged = load_file(output)
        merged.pop(f"{right}embeddings.position_ids", None)
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[key], t) for key, t in expected.items())
        assert verify_checkpoint(output, source, path).ok
    name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    pipeline = getattr(diffusers, name).from_single_file(
        str(tmp_path / "0.safetensors"), config=str(folder), local_files_only=True
    )
    found = dict(pipeline.text_encoder.named_parameters())
    for key, tensor in found.items():
        key = key.removeprefix("text_model.")
        assert torch.equal(tensor, expected[right + key])
    loaded = load_components(wrong, config=folder).text_encoders[0]
    plain = load_components(good, config=folder).text_encoders[0].state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in loaded.state_dict().items())
