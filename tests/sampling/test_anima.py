"""Every setting of ``generate`` on Anima: against Diffusers' pipeline called by hand.

A setting is in `CASES`, `REFUSED` or `WITHOUT_EFFECT`, or in `ELSEWHERE` with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.config import ConfigError
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.models.load import load_components
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from tests.anima import diffusers_pipeline, write_anima
from tests.refusal import refused
from tests.sampling.test_z_image import (
    MASK,
    PHOTO,
    assert_generates,
    difference,
    mask,
    photo,
)

FAMILY = FAMILIES["anima"]
SIDES = {"width": 64, "height": 64}
BASE: dict[str, Any] = {"prompt": "a dog", "seed": 3, "steps": 3, "guidance_scale": 4.0, **SIDES}


class Case(NamedTuple):
    """Settings of ``generate``, what the pipeline is given in their place, and the seeds."""

    settings: Mapping[str, Any]
    call: Mapping[str, Any] | None = None
    seeds: tuple[int, ...] = (3,)


OVER = {"image": photo(), "strength": 0.75}
CASES: dict[str, Case] = {
    "prompt": Case({"prompt": "1girl, red hair"}),
    "negative_prompt": Case({"negative_prompt": "a cat"}),
    "steps": Case({"steps": 5}, {"num_inference_steps": 5}),
    "guidance_scale": Case({"guidance_scale": 1.5}),
    "guidance_scale of none": Case({"guidance_scale": 1}),
    "guidance_rescale": Case({"guidance_rescale": 0.7}),
    "width": Case({"width": 96}),
    "height": Case({"height": 32}),
    "no size": Case({"width": None, "height": None}, {}),
    "seed": Case({"seed": 9}, {}, seeds=(9,)),
    "num_images": Case({"num_images": 2, "batch_size": 1}, {}, seeds=(3, 4)),
    "batch_size": Case({"num_images": 3, "batch_size": 2}, {}, seeds=(3, 4, 5)),
    "dtype": Case({"dtype": "bfloat16"}, {"dtype": torch.bfloat16}),
    "distilled": Case(
        {"distilled": True, "steps": None, "guidance_scale": None},
        {"num_inference_steps": 8, "guidance_scale": 1.0},
    ),
    "vae_tile_size": Case({"vae_tile_size": 64, "width": 128}, {"tiles": 64, "width": 128}),
    "image": Case({"image": PHOTO}, OVER),
    "image of no size": Case({"image": PHOTO, "width": None, "height": None}, OVER),
    "denoise": Case({"image": PHOTO, "denoise": 0.4}, OVER | {"strength": 0.4}),
}  # fmt: skip
HERE, FILES = "tests/formats/test_anima.py and tests/export/test_anima.py", "where files are"
ELSEWHERE = {
    "adapter": HERE, "adapters_file": HERE, "strength": HERE, "direction_strength": HERE,
    "magnitude_strength": HERE, "alpha": HERE, "grid": HERE, "grid_limit": HERE, "repeat": HERE,
    "quantize": "tests/models/test_quantized.py", "base": FILES, "variant": FILES,
    "revision": FILES, "model_config": FILES, "output": FILES, "overwrite": FILES,
    "offload": "where modules are computed, below", "compile": "how blocks are computed",
}  # fmt: skip
REFUSED = {
    "prediction_type": "v_prediction", "zero_terminal_snr": True, "mask_image": MASK,
}  # fmt: skip
WITHOUT_EFFECT: dict[str, Any] = {
    "clip_skip": 9, "max_token_length": 150, "scheduler": "dpm++", "quantize_convolutions": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_anima(tmp_path_factory.mktemp("anima") / "model")


@pytest.fixture
def generate(folder, tmp_path, monkeypatch):
    """Run ``generate``. Returns the file of the image."""
    monkeypatch.chdir(tmp_path)
    photo().save(PHOTO)
    mask().save(MASK)

    def run(output: str = "image.png", **settings: Any) -> Path:
        values = {"base": str(folder), "output": output, **BASE, **settings}
        assert GenerateSettings.read(values).perform() == 0
        return Path(output)

    return run


def by_hand(folder: Path, case: Case) -> list[Any]:
    """Return the images of Diffusers' own pipeline."""
    sized = case.settings.get("width", 0) is not None
    given = case.settings if case.call is None else case.call
    call = {
        "prompt": "a dog", "num_inference_steps": 3, "guidance_scale": 4.0, "dtype": torch.float32,
        "guidance_rescale": 0.0, "tiles": 0, **(SIDES if sized else {}), **given,
    }  # fmt: skip
    pipeline = diffusers_pipeline(folder, call.pop("dtype"))
    for name in ("guidance_scale", "guidance_rescale"):
        setattr(pipeline.guider, name, call.pop(name))
    if tiles := call.pop("tiles"):
        pipeline.vae.enable_tiling(tiles, tiles, tiles * 3 // 4, tiles * 3 // 4)
    return [
        pipeline(**call, output="images", generator=torch.Generator().manual_seed(seed))[0]
        for seed in case.seeds
    ]


def test_every_setting_is_answered():
    settings = {setting.name for setting in GenerateSettings.settings()}
    groups = ({name.partition(" ")[0] for name in CASES} - {"no"}, ELSEWHERE.keys())
    facts = (FAMILY.refused.keys() & settings, FAMILY.without_effect.keys() & settings)
    assert (facts[0], facts[1]) == (REFUSED.keys(), WITHOUT_EFFECT.keys())
    assert settings == set().union(*groups, *facts)
    assert sum(map(len, (*groups, *facts))) == len(settings)


@pytest.mark.parametrize("name", CASES)
def test_images_are_those_of_diffusers(name, folder, generate):
    assert_generates(CASES[name], by_hand(folder, CASES[name]), generate)


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_would_give_wrong_images_are_refused(name, generate):
    with refused(name):
        generate(image=PHOTO, **{name: REFUSED[name]})


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_settings_without_effect_are_named_with_the_reason(name, generate):
    line = f"{name} has no effect on Anima: {FAMILY.without_effect[name]}"
    others = {"quantize": "int8"} if name == "quantize_convolutions" else {}
    with pytest.warns(UserWarning, match=re.escape(line)):
        image = generate(**others, **{name: WITHOUT_EFFECT[name]})
    assert difference(image, generate("without.png", **others)) == 0


def test_an_offloaded_model_makes_the_same_image(gpu, folder):
    """The text encoder and the conditioner in turns, the denoiser alone."""
    settings, made = SamplingSettings(2, **SIDES), []
    for choice in ("none", "model"):
        components, _ = load_adapted(str(folder), offload=choice)
        made += generate_images(components, "a dog", [1], settings)
    assert components.offload_to is not None
    assert made[0].tobytes() == made[1].tobytes()


def test_an_image_beyond_the_positions_of_the_model_is_refused(folder):
    """Positions are of 128 latents a side, of 8 pixels each."""
    components = load_components(folder)
    settings = SamplingSettings(1, width=64, height=1040)
    with pytest.raises(ConfigError, match="64 x 1040 pixels is larger than 1024 on a side"):
        generate_images(components, "a dog", [1], settings)
