"""Exports: the folder and the single file load in diffusers, and hold exactly the merge."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_diffusion.adapters.files import load_adapter
from dora_diffusion.adapters.state import adapter_state
from dora_diffusion.export import ExportError, export_checkpoint, output, verify_checkpoint
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.checkpoint.folder import PipelineFolder
from dora_diffusion.formats.files import stream as safetensors_stream
from dora_diffusion.formats.files.atomic import DiskFullError
from dora_diffusion.formats.files.stream import TensorFileError, TensorReader
from dora_diffusion.merge import Strengths, WeightedAdapter, merge_state
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.weights import LayerWeights

MakeAdapter = Callable[..., dict[str, LayerWeights]]
FAMILIES = ["sd1", "sd2", "sdxl"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{family}_folder")
    return folder


@pytest.fixture
def adapter(
    base: Path, family: str, tmp_path: Path, random_adapter: MakeAdapter
) -> tuple[Path, dict[str, LayerWeights]]:
    layers = random_adapter(base, axis="input" if family == "sd2" else "output", every=3)
    facts = AdapterMetadata(family=family, trigger="sks dog")
    path = write_adapter(tmp_path / "adapter.safetensors", AdapterFile(layers, facts), "kohya")
    return path, read_adapter(path).layers  # as read: the file's own rounding is not the export's


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with PipelineFolder.open(folder) as pipeline:
        return {name: pipeline[name] for name in pipeline.specs}


def state_of(pipeline: Any) -> dict[str, Tensor]:
    """Canonical tensors of a live pipeline."""
    state = {}
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        model = getattr(pipeline, component, None)
        for key, tensor in model.state_dict().items() if model is not None else ():
            text = component.startswith("text_encoder") and not key.startswith("text_")
            state[f"{component}.{'text_model.' if text else ''}{key}"] = tensor
    return {name: tensor for name, tensor in state.items() if "position_ids" not in name}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def test_the_folder_loads_and_holds_the_merge(
    base: Path, tmp_path: Path, adapter: tuple[Path, dict[str, LayerWeights]]
) -> None:
    from diffusers import DiffusionPipeline

    path, layers = adapter
    seen: list[tuple[int, int]] = []
    output = export_checkpoint(
        base, path, tmp_path / "merged", strength=0.8,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    unmerged = tensors_of(base)
    expected = merge_state(unmerged, [WeightedAdapter(layers, Strengths(0.8))])
    changed = [name for name, tensor in expected.items() if not torch.equal(tensor, unmerged[name])]
    assert sorted(changed) == sorted(f"{name}.weight" for name in layers)
    assert_equal(tensors_of(output), expected)
    pipeline = DiffusionPipeline.from_pretrained(output, local_files_only=True)
    assert_equal(state_of(pipeline), expected)
    total = sum(tensor.nbytes for tensor in unmerged.values())
    assert len(seen) == len(unmerged)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    names = {p.relative_to(base) for p in base.rglob("*") if p.is_file()}
    written = {p.relative_to(output) for p in output.rglob("*") if p.is_file()}
    assert written == names | {Path("README.md")}


def test_the_single_file_loads_and_equals_the_folder(
    base: Path, family: str, tmp_path: Path, adapter: tuple[Path, dict[str, LayerWeights]]
) -> None:
    import diffusers

    folder = export_checkpoint(base, adapter[0], tmp_path / "merged")
    file = export_checkpoint(base, adapter[0], tmp_path / "merged.safetensors")
    name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    pipeline = getattr(diffusers, name).from_single_file(
        str(file), config=str(folder), local_files_only=True
    )
    assert_equal(state_of(pipeline), tensors_of(folder))
    assert len(pipeline.tokenizer) > 500


def test_single_file_keys_are_the_original_ones(
    base: Path, family: str, tmp_path: Path, adapter: tuple[Path, dict[str, LayerWeights]]
) -> None:
    file = export_checkpoint(base, adapter[0], tmp_path / "merged.safetensors")
    with TensorReader(file) as reader:
        shapes = {name: spec.shape for name, spec in reader.specs.items()}
    assert shapes["first_stage_model.encoder.mid.attn_1.q.weight"] == (32, 32, 1, 1)
    assert shapes["first_stage_model.decoder.up.3.block.0.conv1.weight"][0] == 32
    assert "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight" in shapes
    if family == "sd1":
        assert "model.diffusion_model.output_blocks.2.1.conv.weight" in shapes
        assert "model.diffusion_model.output_blocks.5.2.conv.weight" in shapes
        assert len(shapes["model.diffusion_model.input_blocks.1.1.proj_in.weight"]) == 4
        prefix = "cond_stage_model.transformer.text_model."
        assert f"{prefix}encoder.layers.2.self_attn.q_proj.weight" in shapes
    if family == "sd2":
        prefix = "cond_stage_model.model."
        assert shapes[f"{prefix}transformer.resblocks.0.attn.in_proj_weight"] == (192, 64)
        assert f"{prefix}text_projection" not in shapes
    if family == "sdxl":
        assert "model.diffusion_model.label_emb.0.2.bias" in shapes
        assert "model.diffusion_model.output_blocks.5.2.conv.weight" in shapes
        prefix = "conditioner.embedders."
        assert f"{prefix}0.transformer.text_model.final_layer_norm.bias" in shapes
        assert shapes[f"{prefix}1.model.text_projection"] == (64, 48)
        assert f"{prefix}1.model.transformer.resblocks.2.mlp.c_proj.bias" in shapes


def test_dtype_applies_to_all_but_the_vae(
    base: Path, tmp_path: Path, adapter: tuple[Path, dict[str, LayerWeights]]
) -> None:
    path, layers = adapter
    output = export_checkpoint(base, path, tmp_path / "half", dtype=torch.float16)
    expected = merge_state(tensors_of(base), [WeightedAdapter(layers)])
    for name, tensor in tensors_of(output).items():
        wanted = expected[name] if name.startswith("vae.") else expected[name].half()
        assert torch.equal(tensor, wanted), name
    config = json.loads((output / "text_encoder" / "config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} <= {None, "float16"}


def test_several_adapters_in_any_order(
    sd1_folder: Path, tmp_path: Path, random_adapter: MakeAdapter
) -> None:
    files = [
        write_adapter(
            tmp_path / str(i), AdapterFile(random_adapter(sd1_folder, seed=i, every=2 + i))
        )
        for i in range(2)
    ]
    one = export_checkpoint(
        sd1_folder, [(files[0], 0.5), (files[1], 0.7)], tmp_path / "one.safetensors"
    )
    two = export_checkpoint(
        sd1_folder, [(files[1], 0.7), (files[0], 0.5)], tmp_path / "two.safetensors"
    )
    first, second = load_file(one), load_file(two)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_shards_variants_and_left_over_weights(
    sd1_folder: Path, tmp_path: Path, random_adapter: MakeAdapter
) -> None:
    """The merged folder has plain names, keeps shards, and no file with unmerged weights."""
    from diffusers import StableDiffusionPipeline

    base = tmp_path / "base"
    shutil.copytree(sd1_folder, base)
    weights = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    (base / "unet/diffusion_pytorch_model.safetensors").unlink()
    keys = sorted(weights)
    parts = [keys[::2], keys[1::2]]
    places = {}
    for number, part in enumerate(parts, start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, base / "unet" / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (base / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (base / "text_encoder/model.safetensors").rename(base / "text_encoder/model.fp16.safetensors")
    (base / "v1-5-pruned.safetensors").write_bytes(b"the unmerged single file")
    (base / "unet/diffusion_pytorch_model.bin").write_bytes(b"the unmerged pickle")
    description = json.loads((base / "model_index.json").read_text())
    description["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (base / "model_index.json").write_text(json.dumps(description))
    layers = random_adapter(sd1_folder)
    file = write_adapter(tmp_path / "a", AdapterFile(layers))
    output = export_checkpoint(base, file, tmp_path / "merged")
    weights_left = {p.relative_to(output).as_posix() for p in output.rglob("*.safetensors")}
    assert weights_left == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert not list(output.rglob("*.bin"))
    pipeline = StableDiffusionPipeline.from_pretrained(output, local_files_only=True)
    expected = tensors_of(export_checkpoint(sd1_folder, file, tmp_path / "plain"))
    assert_equal(state_of(pipeline), expected)


def test_v_prediction_markers(
    sdxl_folder: Path, tmp_path: Path, random_adapter: MakeAdapter
) -> None:
    base = tmp_path / "base"
    shutil.copytree(sdxl_folder, base)
    config = base / "scheduler/scheduler_config.json"
    values = json.loads(config.read_text())
    values |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    config.write_text(json.dumps(values))
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(base, every=20)))
    keys = load_file(export_checkpoint(base, file, tmp_path / "v.safetensors")).keys()
    assert {"v_pred", "ztsnr"} <= keys
    keys = load_file(export_checkpoint(sdxl_folder, file, tmp_path / "e.safetensors")).keys()
    assert not {"v_pred", "ztsnr"} & keys


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
    with pytest.raises(ExportError, match="inside one another"):
        export_checkpoint(sd1_folder, file, sd1_folder / "unet" / "merged.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "merged", "photos"]


@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
def test_a_failed_export_leaves_nothing(
    sd1_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    random_adapter: MakeAdapter,
    name: str,
) -> None:
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    write_one = safetensors_stream._write_one
    count = 0

    def full_after_a_while(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_one(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_stream, "_write_one", full_after_a_while)
        with pytest.raises(DiskFullError, match="the disk is full"):
            export_checkpoint(sd1_folder, file, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with monkeypatch.context() as patch:
        patch.setattr(output.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
        with pytest.raises(DiskFullError, match=r"0\.00 GB free"):
            export_checkpoint(sd1_folder, file, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_that_reads_back_wrong_is_not_kept(
    sd1_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    random_adapter: MakeAdapter,
) -> None:
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    write_one = safetensors_stream._write_one

    def corrupt(stream: Any, key: str, spec: Any, tensor: Tensor) -> None:
        write_one(stream, key, spec, tensor + 1 if tensor.is_floating_point() else tensor)

    monkeypatch.setattr(safetensors_stream, "_write_one", corrupt)
    with pytest.raises(ExportError, match="did not read back"):
        export_checkpoint(sd1_folder, file, tmp_path / "merged.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_components_outside_of_the_folder_are_refused(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    """A model from elsewhere could copy files from anywhere to anywhere."""
    base = tmp_path / "models" / "base"
    shutil.copytree(sd1_folder, base)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("private")
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    index = json.loads((base / "model_index.json").read_text())
    output = tmp_path / "one" / "two" / "merged"
    single = export_checkpoint(sd1_folder, file, tmp_path / "base.safetensors")
    for name in ("../../secrets", str(tmp_path / "secrets"), "unet/../../../secrets", ".."):
        text = json.dumps({**index, name: ["diffusers", "Anything"]})
        (base / "model_index.json").write_text(text)
        with pytest.raises(TensorFileError, match="is not the name of a folder in it"):
            export_checkpoint(base, file, output)
        with pytest.raises(TensorFileError, match="is not the name of a folder in it"):
            export_checkpoint(single, file, output, config=base)
    assert [path.parent.name for path in tmp_path.rglob("key")] == ["secrets"]


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
        with pytest.raises(ExportError, match="which is read for it; choose another name"):
            export_checkpoint(base, adapter, target, vae=vae, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("calls", [1, 2])
def test_an_interruption_puts_the_old_folder_back(
    tmp_path: Path, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch, random_adapter: MakeAdapter,
    calls: int,
) -> None:  # fmt: skip
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    merged = export_checkpoint(sd1_folder, file, tmp_path / "merged")
    (merged / "mine.txt").write_text("of the old folder")
    rename = os.rename
    done = 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal done
        done += 1
        if done == 2:
            raise KeyboardInterrupt
        rename(source, target)
        if done == calls == 1:
            done += 1
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output.os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(sd1_folder, file, merged, strength=0.5, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "merged"]
    assert (merged / "mine.txt").read_text() == "of the old folder"


def test_a_linked_folder_is_replaced_where_it_lies(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter
) -> None:
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=20)))
    real = export_checkpoint(sd1_folder, file, tmp_path / "elsewhere" / "real", strength=0.0)
    link = tmp_path / "link"
    link.symlink_to(real)
    export_checkpoint(sd1_folder, file, link, overwrite=True)
    assert link.is_symlink()
    assert not real.is_symlink()
    expected = tensors_of(export_checkpoint(sd1_folder, file, tmp_path / "plain"))
    assert_equal(tensors_of(real), expected)


def test_the_home_folder_is_found(
    tmp_path: Path, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch, random_adapter: MakeAdapter
) -> None:
    """A quoted ~ in a command, and every one in Python."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(sd1_folder, tmp_path / "base")
    write_adapter(tmp_path / "a.safetensors", AdapterFile(random_adapter(sd1_folder, every=20)))
    export_checkpoint("~/base", "~/a.safetensors", "~/merged")
    assert (tmp_path / "merged" / "model_index.json").is_file()


@pytest.mark.parametrize("axis", ["output", "input"])
def test_flat_magnitudes_are_merged_as_the_base_tells(
    tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter, axis: str
) -> None:
    """Exported, verified and put on live modules: the same as with magnitudes that tell."""
    layers = random_adapter(sd1_folder, axis=axis, every=7)
    facts = AdapterMetadata("sd1")
    file = write_adapter(tmp_path / "a.safetensors", AdapterFile(layers, facts), "kohya")
    flat = tmp_path / "flat.safetensors"
    tensors = load_file(file)
    save_file({k: t.flatten() if k.endswith("dora_scale") else t for k, t in tensors.items()}, flat)
    expected = tensors_of(export_checkpoint(sd1_folder, file, tmp_path / "plain"))
    output = export_checkpoint(sd1_folder, flat, tmp_path / "merged")
    assert_equal(tensors_of(output), expected)
    assert verify_checkpoint(output, sd1_folder, flat).ok
    components = load_components(sd1_folder).adaptable()
    load_adapter(components, flat)
    state = adapter_state(components)
    assert {layer.norm_axis for layer in state.values()} == {axis}
    assert all(torch.equal(state[name].magnitude, one.magnitude) for name, one in layers.items())
