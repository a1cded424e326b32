"""Indexes of pipelines' folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, ModularPipeline
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks
from diffusers.schedulers import EulerDiscreteScheduler

from dora_diffusion.config.pipeline_index import (
    INDEXES,
    component_classes,
    index_file,
    is_pipeline,
)


@pytest.fixture
def modular(tmp_path: Path) -> Path:
    """Folder that Diffusers wrote, with three of the components."""
    pipeline: ModularPipeline = StableDiffusionXLAutoBlocks().init_pipeline()
    vae = AutoencoderKL(
        block_out_channels=(32,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    pipeline.update_components(vae=vae, scheduler=EulerDiscreteScheduler())
    pipeline.save_pretrained(str(tmp_path / "modular"))
    return tmp_path / "modular"


def test_classes_of_loaded_and_of_other_components_of_a_modular_index(modular: Path) -> None:
    assert index_file(modular).name == "modular_model_index.json"
    classes = component_classes(json.loads(index_file(modular).read_text("utf-8")))
    assert classes["vae"] == "AutoencoderKL"
    assert classes["scheduler"] == "EulerDiscreteScheduler"
    assert classes["unet"] == "UNet2DConditionModel"  # By its hint, since it was not loaded.


def test_a_usual_index_comes_first(modular: Path, tmp_path: Path) -> None:
    assert is_pipeline(modular)
    assert not is_pipeline(tmp_path)
    assert index_file(tmp_path) == tmp_path / INDEXES[0]
    (modular / INDEXES[0]).write_text("{}", encoding="utf-8")
    assert index_file(modular) == modular / INDEXES[0]


def test_components_that_are_absent_have_no_class() -> None:
    index = {
        "_class_name": "X", "safety_checker": [None, None], "unet": ["diffusers", "U"],
        "vae": [None, None, {}],
    }  # fmt: skip
    assert component_classes(index) == {"safety_checker": None, "unet": "U", "vae": None}
