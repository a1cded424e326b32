"""Every setting of ``generate`` against Diffusers' own pipeline called by hand, bit for bit.

A setting is in `CASES`, or in `ELSEWHERE` with the test that compares it or the reason for none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.config.schedulers import SCHEDULERS

BASE: dict[str, Any] = {"prompt": "a dog", "seed": 3, "steps": 3, "guidance_scale": 4.0}


class Case(NamedTuple):
    """Settings of ``generate``, what the pipeline is given, and what is done to it before."""

    settings: Mapping[str, Any]
    call: Mapping[str, Any] = {}
    change: Callable[[Any], object] = lambda pipeline: None
    seeds: tuple[int, ...] = (3,)


def scheduled(class_name: str, **settings: Any) -> Callable[[Any], object]:
    """Give a pipeline another scheduler over its own noise schedule."""

    def change(pipeline: Any) -> None:
        # Latents are not confined to [-1, 1], which some classes take them to be.
        config = {**pipeline.scheduler.config, "clip_sample": False, **settings}
        pipeline.scheduler = getattr(diffusers, class_name).from_config(config)

    return change


def tiled(pipeline: Any) -> None:
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 64, 8


CASES: dict[str, Case] = {
    "prompt": Case({"prompt": "a red mug, on grass"}, {"prompt": "a red mug, on grass"}),
    "negative_prompt": Case({"negative_prompt": "a cat"}, {"negative_prompt": "a cat"}),
    "steps": Case({"steps": 5}, {"num_inference_steps": 5}),
    "guidance_scale": Case({"guidance_scale": 1.5}, {"guidance_scale": 1.5}),
    "guidance_rescale": Case({"guidance_rescale": 0.7}, {"guidance_rescale": 0.7}),
    "width": Case({"width": 88}, {"width": 88, "height": 64}),
    "height": Case({"height": 40}, {"width": 64, "height": 40}),
    "seed": Case({"seed": 9}, seeds=(9,)),
    "num_images": Case({"num_images": 2, "batch_size": 1}, seeds=(3, 4)),
    "batch_size": Case(
        {"num_images": 2, "batch_size": 2},
        {"num_images_per_prompt": 2},
        lambda pipeline: pipeline.vae.enable_slicing(),
        (3, 4),
    ),
    "prediction_type": Case(
        {"prediction_type": "v_prediction"},
        change=scheduled("PNDMScheduler", prediction_type="v_prediction"),
    ),
    "dtype": Case({"dtype": "bfloat16"}, change=lambda pipeline: pipeline.to(torch.bfloat16)),
    "distilled": Case(
        {"distilled": True, "steps": None, "guidance_scale": None},
        {"num_inference_steps": 8, "guidance_scale": 1.0},
    ),
    "vae_tile_size": Case({"vae_tile_size": 64, "width": 128}, {"width": 128, "height": 64}, tiled),
    **{
        f"scheduler {name}": Case(
            {"scheduler": name}, change=scheduled(each.class_name, **each.settings)
        )
        for name, each in SCHEDULERS.items()
    },
}  # fmt: skip

STACKED = "sampling/test_stack.py::test_a_stack_is_the_exported_merge_of_the_same_adapters"
PAINTED = "sampling/test_painting.py::test_images_are_those_of_the_pipelines_called_by_hand"
GRID = (
    "cli/commands/test_grid.py"
    "::test_each_cell_is_the_plain_image_of_its_settings_and_repeats_to_the_same_bytes"
)
READ = "sampling/test_generate.py::test_prompts_are_read_as_the_adapter_says"
ELSEWHERE = {
    "adapter": STACKED,
    "strength": STACKED,
    "direction_strength": "sampling/test_generate.py::test_the_knobs_reach_every_layer",
    "magnitude_strength": "sampling/test_generate.py::test_the_knobs_reach_every_layer",
    "adapters_file": "sampling/test_pool.py::test_each_image_is_that_of_its_adapter_alone",
    "image": PAINTED,
    "mask_image": PAINTED,
    "denoise": PAINTED,
    "grid": GRID,
    "grid_limit": GRID,
    "clip_skip": READ,
    "max_token_length": READ,
    "zero_terminal_snr": (
        "sampling/test_generate.py::test_zero_terminal_snr_samples_as_its_paper_says"
    ),
    "offload": (
        "models/test_offload.py::test_an_offloaded_model_makes_the_same_images_and_goes_home"
    ),
    "compile": "adapters/test_compiled.py::test_each_block_is_one_graph_and_computes_the_same",
    "variant": "models/test_load.py::test_variants",
    "quantize": "sampling/test_stack.py::test_a_stack_on_a_quantised_base_writes_no_weight",
    "quantize_convolutions": "Diffusers quantises by libraries of other formats",
    "base": "every case has one",
    "revision": "what is downloaded, from a hub",
    "model_config": "how a single file is read, before there is a model",
    "alpha": "how an adapter's file is read, before there is a model",
    "output": "where the image is written",
    "overwrite": "where the image is written",
    "repeat": "it gives other settings, and says nothing itself",
}


def test_every_setting_is_compared_or_says_why_not():
    settings = {setting.name for setting in GenerateSettings.settings()}
    compared = {name.partition(" ")[0] for name in CASES}
    assert not compared & set(ELSEWHERE)
    assert compared | set(ELSEWHERE) == settings
    tests = Path(__file__).parents[1]
    for place in ELSEWHERE.values():
        file, colons, name = place.partition("::")
        if colons:
            assert f"\ndef {name}(" in (tests / file).read_text(encoding="utf-8"), place


@pytest.fixture(scope="module")
def parts(sd1_folder):
    """Parts of Diffusers' own pipeline; each test has copies of them, which it may change."""
    return diffusers.StableDiffusionPipeline.from_pretrained(sd1_folder).components


@pytest.mark.parametrize("name", CASES)
def test_images_are_those_of_the_pipeline_called_by_hand(
    name, sd1_folder, parts, tmp_path, monkeypatch
):
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    settings = {"base": str(sd1_folder), "output": "image.png", **BASE, **case.settings}
    assert GenerateSettings.read(settings).perform() == 0
    pipeline = diffusers.StableDiffusionPipeline(
        **copy.deepcopy(parts), requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    case.change(pipeline)
    call = {
        "prompt": BASE["prompt"], "num_inference_steps": BASE["steps"],
        "guidance_scale": BASE["guidance_scale"], **case.call,
    }  # fmt: skip
    generators = [torch.Generator().manual_seed(seed) for seed in case.seeds]
    if "num_images_per_prompt" in call:
        expected = pipeline(**call, generator=generators).images
    else:
        expected = [pipeline(**call, generator=generator).images[0] for generator in generators]
    for seed, image in zip(case.seeds, expected, strict=True):
        file = f"image-{seed}.png" if len(case.seeds) > 1 else "image.png"
        with Image.open(file) as made:
            assert np.array_equal(np.asarray(made), np.asarray(image))
