"""Exports of whole models, loaded by Diffusers itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from dora_diffusion.adapters.state import adapter_state, load_adapter
from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import (
    ExportError,
    convert_adapter,
    export_checkpoint,
    files,
    verify_checkpoint,
)
from dora_diffusion.export.checkpoint import export_trained
from dora_diffusion.export.files import open_model
from dora_diffusion.export.metadata import trained_steps, trained_trigger
from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.formats.files import stream as safetensors_stream
from dora_diffusion.formats.files.atomic import DiskFullError
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.merging import merge_tensor
from dora_diffusion.numerics.weights import LayerWeights, MergeStrengths, Strengths
from tests.export.helpers import MakeAdapter, assert_equal, tensors_of


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file_base_merges_as_the_folder_does(
    tmp_path: Path, family: str, deep: Callable[[str], Path], random_adapter: MakeAdapter
) -> None:
    folder = deep(family)
    base = export_checkpoint(folder, (), tmp_path / "base.safetensors")
    file = write_adapter(tmp_path / "a", AdapterFile(random_adapter(folder, seed=1, every=2)))
    seen: list[Any] = []
    merged = export_checkpoint(
        base, file, tmp_path / "merged.safetensors", on_progress=lambda *step: seen.append(step)
    )
    expected = load_file(export_checkpoint(folder, file, tmp_path / "expected.safetensors"))
    actual = load_file(merged)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    size = sum(tensor.nbytes for tensor in expected.values())
    assert seen[-1] == (size, size)
    report = convert_adapter(file, tmp_path / "d", "dense", base=base, family=family)
    assert report.layers == len(read_adapter(file).layers)


def test_without_an_adapter_a_model_changes_its_layout_alone(
    tmp_path: Path, sd1_folder: Path
) -> None:
    """Results of a whole training: folder, file and folder again, with their metadata."""
    facts = AdapterMetadata("sd1", trigger="sks dog", extra={"training_steps": "7"})
    trained = {"unet.conv_in.bias": lambda: torch.ones(32)}
    folder = export_trained(BaseModel(sd1_folder), trained, tmp_path / "run" / "model", facts)
    file = export_checkpoint(tmp_path / "run", (), tmp_path / "one.safetensors")
    again = export_checkpoint(BaseModel(file, model_config=sd1_folder), (), tmp_path / "again")
    assert_equal(tensors_of(again), tensors_of(folder))
    with open_model(file) as one:
        assert one.metadata["modelspec.trigger_phrase"] == "sks dog"
        assert "dora_diffusion.merged" not in one.metadata
    for path in (file, again):
        with open_model(path) as model:
            assert trained_trigger(model.metadata) == "sks dog"
            assert trained_steps(model.metadata) == 7
            assert torch.equal(model["unet.conv_in.bias"], torch.ones(32))
    half = export_checkpoint(folder, (), tmp_path / "half", dtype=torch.float16)
    assert tensors_of(half)["unet.conv_in.weight"].dtype == torch.float16
    assert (half / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    with pytest.warns(UserWarning, match="unet_strength has no effect because no adapter is given"):
        export_checkpoint(
            folder, (), tmp_path / "s.safetensors", strength=MergeStrengths(unet_strength=0.5)
        )
    with pytest.raises(ExportError, match="no adapter was given"):
        verify_checkpoint(file, folder, ())


PREFIX = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


WHOLE = save(
    {
        f"{PREFIX}.lora_down.weight": torch.ones(2, 8),
        f"{PREFIX}.lora_up.weight": torch.ones(6, 2),
        f"{PREFIX}.alpha": torch.tensor(2.0),
        f"{PREFIX}.dora_scale": torch.ones(6, 1),
    },
    {"ss_network_dim": "2", "ss_network_alpha": "1", "dora_diffusion.rank": "2"},
)


KILLED = """
import psutil, sys
from dora_diffusion.export import export_checkpoint

def kill_halfway(done, total):
    if done > total / 2:
        psutil.Process().kill()

base, adapter, output = sys.argv[1:]
export_checkpoint(base, adapter, output, overwrite=True, on_progress=kill_halfway)
"""


@pytest.mark.parametrize(
    "name", ["merged", pytest.param("merged.safetensors", marks=pytest.mark.slow)]
)
def test_a_killed_export_leaves_the_old_one(
    tmp_path: Path, sd1_folder: Path, random_adapter: Callable[..., Any], name: str
) -> None:
    path = write_adapter(tmp_path / "a", AdapterFile(random_adapter(sd1_folder, every=9)))
    output = tmp_path / name
    if name == "merged":
        output.mkdir()
        (output / "model_index.json").write_text("{}", encoding="utf-8")
    else:
        output.write_bytes(WHOLE)

    def contents() -> dict[str, bytes]:
        files = [output] if output.is_file() else sorted(output.rglob("*"))
        return {file.name: file.read_bytes() for file in files}

    before = contents()
    command = [sys.executable, "-c", KILLED, str(sd1_folder), str(path), str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    assert result.returncode not in (0, 1), result.stderr
    assert contents() == before
    left = {p.name for p in tmp_path.iterdir()} - {"a", name}
    assert all(file.startswith(".") and file.endswith(".tmp") for file in left), left


def state_of(pipeline: Any) -> dict[str, Tensor]:
    """Canonical tensors of a live pipeline."""
    state = {}
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        model = getattr(pipeline, component, None)
        for key, tensor in model.state_dict().items() if model is not None else ():
            text = component.startswith("text_encoder") and not key.startswith("text_")
            state[f"{component}.{'text_model.' if text else ''}{key}"] = tensor
    return {name: tensor for name, tensor in state.items() if "position_ids" not in name}


def merged_state(
    base: dict[str, Tensor], layers: dict[str, LayerWeights], strengths: Strengths
) -> dict[str, Tensor]:
    return {
        name: merge_tensor(tensor, [(layers[module], strengths)])
        if (module := name.removesuffix(".weight")) in layers
        else tensor
        for name, tensor in base.items()
    }


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
    expected = merged_state(unmerged, layers, Strengths(0.8))
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


def test_shards_variants_and_left_over_weights(
    sd1_folder: Path, tmp_path: Path, random_adapter: MakeAdapter
) -> None:
    """The merged folder has plain names, keeps shards, and no file with unmerged weights."""
    from diffusers import StableDiffusionPipeline

    base = tmp_path / "base"
    shutil.copytree(sd1_folder, base)
    # Of the other file: what is loaded is a map, and Windows removes no mapped file.
    weights = load_file(sd1_folder / "unet/diffusion_pytorch_model.safetensors")
    (base / "unet/diffusion_pytorch_model.safetensors").unlink()
    keys = sorted(weights)
    parts = [keys[::2], keys[1::2]]
    places = {}
    for number, part in enumerate(parts, start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, base / "unet" / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (base / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index), encoding="utf-8"
    )
    (base / "text_encoder/model.safetensors").rename(base / "text_encoder/model.fp16.safetensors")
    (base / "v1-5-pruned.safetensors").write_bytes(b"the unmerged single file")
    (base / "unet/diffusion_pytorch_model.bin").write_bytes(b"the unmerged pickle")
    description = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    description["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (base / "model_index.json").write_text(json.dumps(description), encoding="utf-8")
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
        patch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
        with pytest.raises(DiskFullError, match=r"0\.00 GB free"):
            export_checkpoint(sd1_folder, file, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


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
