"""Base models that are found on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.studio.jobs import bases
from dora_diffusion.studio.jobs.bases import Base, in_folder, in_hub_cache
from tests.studio.jobs.helpers import write_checkpoint, write_folder

pytestmark = pytest.mark.usefixtures("cache")
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


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
    where = "named with --model_folders"
    assert in_folder(folder) == [
        Base(str(one), "sdxl", where), Base(str(two), "sd1", where),
    ]  # fmt: skip
    offered = bases.bases(tmp_path, (), [folder, tmp_path / "missing"])
    assert [base.name for base in offered if base.where == where] == [str(one), str(two)]


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


def test_a_license_that_forbids_commercial_use_is_said_where_a_model_is_chosen() -> None:
    marked = {name for name in FAMILIES if "non-commercial" in Base("x/y", name, "here").label}
    assert marked == {"flux2-klein-9b", "anima"}
