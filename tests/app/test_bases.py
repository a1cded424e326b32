"""Base models that the app finds, and those that it refuses before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dora_diffusion.app import bases
from dora_diffusion.app.bases import (
    Base,
    check_base,
    check_variant,
    facts_of,
    in_folder,
    in_hub_cache,
    model_folders,
)
from dora_diffusion.families import FAMILIES
from dora_diffusion.jobs.workspace import AppError

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's library."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(bases, "hub_cache", lambda: folder)
    return folder


def write_folder(folder: Path, *, kind: str = "UNet2DConditionModel", weights: bool = True) -> Path:
    (folder / "unet").mkdir(parents=True)
    index = {"unet": ["diffusers", kind], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    config = {"sample_size": 64, "block_out_channels": [320, 640, 1280, 1280]}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    if weights:
        (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    return folder


def write_checkpoint(path: Path, family: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({FAMILIES[family].checkpoint_key: torch.zeros(1)}, path)
    return path


@pytest.mark.parametrize(
    ("name", "family", "resolution", "is_full"),
    [("embedded:tiny-sd", "sd1", 64, False), (SDXL, "sdxl", 1024, True),
     ("somebody/something", "", 512, False)],
)  # fmt: skip
def test_facts_of_models_that_are_named(
    name: str, family: str, resolution: int, is_full: bool
) -> None:
    facts = facts_of(name)
    assert (facts.family, facts.resolution, facts.has_released_shape) == (
        family, resolution, is_full,
    )  # fmt: skip


def test_the_size_is_what_the_model_itself_says(sd1_folder: Path) -> None:
    from dora_diffusion.models.load import load_components

    for name in (sd1_folder, "embedded:tiny-sdxl"):
        facts, loaded = facts_of(str(name)), load_components(name)
        assert facts.resolution == loaded.default_resolution
        assert facts.family == loaded.family.name
        assert not facts.has_released_shape


def test_models_in_folders_are_found_and_other_files_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    one = write_checkpoint(folder / "deep" / "xl.safetensors", "sdxl")
    two = write_folder(folder / "pipeline")
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, folder / "lora.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\xff" * 30)
    (folder / "old.ckpt").write_bytes(b"x")
    write_folder(folder / "flux", kind="FluxTransformer2DModel")
    write_checkpoint(folder / "a" / "b" / "too_deep.safetensors", "sd1")
    (folder / "loop").symlink_to(folder)
    assert in_folder(folder, "there") == [
        Base(str(one), "sdxl", "there"), Base(str(two), "sd1", "there"),
    ]  # fmt: skip


def test_the_usual_places_are_those_that_are_configured(tmp_path: Path) -> None:
    places = {
        "COMFYUI_PATH": tmp_path / "comfy" / "models" / "checkpoints",
        "A1111_PATH": tmp_path / "a1111" / "models" / "Stable-diffusion",
        "DORA_DIFFUSION_MODELS": tmp_path / "own",
        "file": tmp_path / "listed",
        "flag": tmp_path / "flag",
    }
    for folder in places.values():
        folder.mkdir(parents=True)
    (tmp_path / "model_folders.txt").write_text(f"{places['file']}\n\n/no/such/folder\n")
    environment = {
        "COMFYUI_PATH": str(tmp_path / "comfy"),
        "A1111_PATH": str(tmp_path / "a1111"),
        "DORA_DIFFUSION_MODELS": f"{places['DORA_DIFFUSION_MODELS']}:/no/such/folder",
    }
    found = [folder for folder, _ in model_folders(environment, tmp_path, [places["flag"]])]
    assert sorted(found) == sorted(places.values())
    assert model_folders({}, tmp_path / "comfy", []) == []


def test_downloaded_models_are_offered_once_and_only_with_weights(
    cache: Path, tmp_path: Path
) -> None:
    write_folder(cache / "models--ann--dogs" / "snapshots" / "1")
    write_folder(cache / "models--bob--cats" / "snapshots" / "1", weights=False)
    write_folder(cache / "models--stable-diffusion-v1-5--stable-diffusion-v1-5" / "snapshots" / "1")
    assert [base.name for base in in_hub_cache()] == [
        "ann/dogs", "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ]  # fmt: skip
    offered = bases.bases(tmp_path, ("org/listed",), ())
    names = [base.name for base in offered]
    assert len(names) == len(set(names))
    where = {base.name: base.where for base in offered}
    assert where["stable-diffusion-v1-5/stable-diffusion-v1-5"] == "in the hub's cache"
    assert where[SDXL] == "to be downloaded"
    assert where["org/listed"] == "named with --models"
    assert names[0] == "embedded:tiny-sd"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("/no/such/folder", "does not exist; choose a Diffusers folder"),
        ("no/such/file.safetensors", "does not exist; choose"),
        ("three parts of text", "does not exist; choose"),
        ("model.ckpt", "is a pickle"),
        ("embedded:other", "no embedded model"),
    ],
)
def test_a_model_that_is_not_there_is_refused(name: str, match: str) -> None:
    with pytest.raises(AppError, match=match):
        check_base(name)


def test_a_file_or_folder_that_is_no_base_model_is_refused(tmp_path: Path) -> None:
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    write_folder(tmp_path / "flux", kind="FluxTransformer2DModel")
    (tmp_path / "notes.txt").write_text("x")
    for name, match in (
        ("lora.safetensors", "not a full checkpoint"),
        ("flux", "not supported"),
        ("notes.txt", "is no model"),
        ("", "no model_index.json"),
    ):
        with pytest.raises(AppError, match=match):
            check_base(str(tmp_path / name))
    check_base(str(write_checkpoint(tmp_path / "xl.safetensors", "sdxl")))
    check_base(str(write_folder(tmp_path / "pipeline")))


def test_the_hub_is_asked_only_when_a_run_is_to_begin(cache: Path) -> None:
    check_base("nobody/nothing")
    with pytest.raises(AppError, match="HF_HUB_OFFLINE is set"):
        check_base("nobody/nothing", ask_hub=True)
    write_folder(cache / "models--nobody--nothing" / "snapshots" / "1")
    check_base("nobody/nothing", ask_hub=True)


def test_a_variant_without_weights_is_refused(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "pipeline"))
    check_variant(folder, None)
    check_variant(folder, "fp16")
    with pytest.raises(AppError, match=r"no weights of the variant 'bf16'; its UNet is .*fp16"):
        check_variant(folder, "bf16")
