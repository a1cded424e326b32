"""Base and adapted model, asked the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
from dora_diffusion.config import AdapterConfig
from dora_diffusion.evaluation.measures import ScoredImage
from dora_diffusion.evaluation.photos import base_and_adapted, first_round, sample
from dora_diffusion.models.load import load_components
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.settings import SamplingSettings

REQUESTS = [ScoredImage("subject", "a photo of a sks dog", 0, 7), ScoredImage("pose", "b", 0, 8)]
SETTINGS = SamplingSettings(steps=2, guidance_scale=1.0, scheduler="ddim", width=32, height=32)


def test_the_base_is_the_model_without_its_adapters_and_steps_count_both(sd1_folder) -> None:
    components = load_components(sd1_folder)
    prompts, seeds = [r.prompt for r in REQUESTS], [r.seed for r in REQUESTS]
    before = generate_images(components, prompts, seeds, SETTINGS, batch_size=2)
    inject_adapters(components.denoiser, AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapter_parameters(components.denoiser):
            parameter.add_(0.1)
    steps: list[tuple[int, int]] = []
    answers = base_and_adapted(
        components,
        lambda report: sample(components, REQUESTS, SETTINGS, 2, report),
        [0],
        lambda *numbers: steps.append(numbers),
    )
    assert list(answers) == ["base", "adapted"]
    for image, expected in zip(answers["base"], before, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    adapted = generate_images(components, prompts, seeds, SETTINGS, batch_size=2)
    for image, expected in zip(answers["adapted"], adapted, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert not np.array_equal(np.asarray(adapted[0]), np.asarray(before[0]))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(ValueError, match="no seeds"):
        base_and_adapted(components, lambda report: None, [], None)


def test_the_sheet_shows_the_first_round_without_hidden_groups() -> None:
    requests = [*REQUESTS, ScoredImage("subject", "a photo of a sks dog", 1, 1007)]
    shown = first_round(requests, {"base": ["x", "y", "z"]}, {"pose"})
    assert shown == {"images": {"base": ["x"]}, "labels": ["a sks dog"]}
