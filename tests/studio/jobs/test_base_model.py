"""Facts of a base model before it is loaded, and models that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.models.locate import model_info
from dora_diffusion.studio.jobs.bases import check_base
from dora_diffusion.studio.jobs.store import UserError
from tests.studio.jobs.helpers import write_checkpoint, write_folder

pytestmark = pytest.mark.usefixtures("cache")
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize(
    ("name", "family", "resolution", "is_full"),
    [("embedded:tiny-sd", "sd1", 64, False), (SDXL, "sdxl", 1024, True),
     ("somebody/something", "", 512, False)],
)  # fmt: skip
def test_traits_of_models_that_are_named(
    name: str, family: str, resolution: int, is_full: bool
) -> None:
    info = model_info(name)
    assert (info.family, info.resolution, info.has_released_shape) == (
        family, resolution, is_full,
    )  # fmt: skip


def test_the_size_is_what_the_model_itself_says(sd1_folder: Path) -> None:
    from dora_diffusion.models.load import load_components

    for name in (sd1_folder, "embedded:tiny-sdxl"):
        info, loaded = model_info(str(name)), load_components(name)
        assert info.resolution == loaded.default_resolution
        assert info.family == loaded.family.name
        assert not info.has_released_shape


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
    with pytest.raises(UserError, match=match):
        check_base(name)


def test_a_file_or_folder_that_is_no_base_model_is_refused(tmp_path: Path) -> None:
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    write_folder(tmp_path / "flux", kind="FluxTransformer2DModel")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    for name, match in (
        ("lora.safetensors", "not a full checkpoint"),
        ("flux", "not supported"),
        ("notes.txt", "is not a model"),
        ("", "no model_index.json"),
    ):
        with pytest.raises(UserError, match=match):
            check_base(str(tmp_path / name))
    check_base(str(write_checkpoint(tmp_path / "xl.safetensors", "sdxl")))
    check_base(str(write_folder(tmp_path / "pipeline")))


def test_what_a_run_names_is_what_is_loaded() -> None:
    settings = TrainConfig(
        pretrained_vae_model_name_or_path="v", model_config="c", variant="fp16", revision="r"
    ).to_dict()
    model = settings["pretrained_model_name_or_path"]
    assert BaseModel.of_settings(settings) == BaseModel(model, "fp16", "r", "c", "v")
    assert BaseModel.of_settings({"variant": "", "base": "b"}) == BaseModel("b")
