"""The figures of the cards, measured again on the models that ship, and how they are measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dora_diffusion.toy.instrument import Instrument
from lab.pretrain.card import for_judges, generate, measure_prompts, measure_vae


@pytest.mark.slow
def test_tiny_sd_draws_what_prompts_say(tiny_sd: Any, instrument: Instrument) -> None:
    accuracy = measure_prompts(tiny_sd, instrument, 16)
    assert accuracy["kind"] >= 0.85
    assert accuracy["color"] >= 0.85
    assert accuracy["background"] >= 0.9
    assert accuracy["all"] >= 0.7


@pytest.mark.slow
def test_tiny_sdxl_draws_what_prompts_say(tiny_sdxl: Any, instrument: Instrument) -> None:
    accuracy = measure_prompts(tiny_sdxl, instrument, 12)
    assert accuracy["kind"] >= 0.8
    assert accuracy["color"] >= 0.8
    assert accuracy["background"] >= 0.8


@pytest.mark.slow
def test_the_autoencoder_of_tiny_sd_keeps_new_subjects_themselves(
    tiny_sd: Any, instrument: Instrument
) -> None:
    measured = measure_vae(tiny_sd.vae, instrument, 40)
    assert measured["psnr"] >= 32
    assert measured["self"] >= 0.9
    assert measured["identity"] >= 0.93 * measured["identity_ceiling"]


@pytest.mark.slow
def test_the_autoencoder_of_tiny_sdxl_keeps_new_subjects_themselves(
    tiny_sdxl: Any, instrument: Instrument
) -> None:
    measured = measure_vae(tiny_sdxl.vae, instrument, 20)
    assert measured["psnr"] >= 36
    assert measured["identity"] >= 0.95 * measured["identity_ceiling"]


def test_one_seed_gives_one_image(tiny_sd: Any) -> None:
    first, second = (np.asarray(generate(tiny_sd, ["a red mug"], 5)[0]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_judges_see_means_of_blocks() -> None:
    pixels = torch.rand(1, 3, 128, 128)
    blocks = pixels.view(1, 3, 64, 2, 64, 2).mean((3, 5))
    torch.testing.assert_close(for_judges(pixels), blocks)
