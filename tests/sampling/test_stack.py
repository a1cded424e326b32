"""Several adapters on one model: the merge of the same, and strengths by component."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import export_checkpoint
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.weights import MergeStrengths
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.sampling.stack import AdapterUse, name_of

QUICK = SamplingSettings(steps=3, guidance_scale=4.0, scheduler="euler")
PROMPT = "a photo of a sks dog"


@pytest.fixture(scope="module")
def files(sd1_folder, random_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(
            folder / f"{trigger}.safetensors",
            AdapterFile(
                random_adapter(sd1_folder, seed=seed, every=2, mixed_ranks=True),
                AdapterMetadata("sd1", trigger=f"sks {trigger}", extra={"clip_skip": "1"}),
            ),
        )
        for seed, trigger in ((1, "dog"), (2, "cat"))
    ]


def numbers(components, seed=3, steps=3):
    """Pixels before they are rounded, of Diffusers' pipeline called by hand."""
    pipeline = components.pipeline("euler")
    with torch.no_grad():
        return pipeline(
            PROMPT, num_inference_steps=steps, guidance_scale=4.0, output_type="np",
            generator=torch.Generator().manual_seed(seed),
        ).images[0]  # fmt: skip


def pixels(images):
    return np.stack([np.asarray(image, np.int16) for image in images])


def uses_of(files):
    strengths = (
        MergeStrengths(0.7, text_encoder_strength=0.5),
        MergeStrengths(-0.4, 0.9, 0.8, unet_strength=0.5),
    )
    return [AdapterUse(f, s) for f, s in zip(files, strengths, strict=True)]


def test_a_stack_is_the_exported_merge_of_the_same_adapters(sd1_folder, files, tmp_path):
    pairs = list(zip(files, (0.7, -0.4), strict=True))
    strengths = MergeStrengths(0.9, 0.8, 0.6, unet_strength=0.5, text_encoder_strength=1.5)
    merged = export_checkpoint(sd1_folder, pairs, tmp_path / "merged", strength=strengths)
    uses = [
        AdapterUse(file, dataclasses.replace(strengths, strength=0.9 * own)) for file, own in pairs
    ]
    stacked, metadata = load_adapted(sd1_folder, uses)
    assert (metadata.trigger, metadata.extra) == ("sks dog, sks cat", {"clip_skip": "1"})
    assert stacked.clip_skip == 1
    expected = numbers(load_components(merged))
    plain = stacked.reading(0, None)
    assert np.abs(numbers(plain) - expected).max() < 1e-5
    assert np.abs(numbers(load_components(sd1_folder)) - expected).max() > 1e-2
    # The order does not matter, and either alone is another image.
    turned, _ = load_adapted(sd1_folder, uses[::-1])
    assert np.abs(numbers(turned) - expected).max() < 1e-5
    for use in uses:
        assert np.abs(numbers(load_adapted(sd1_folder, [use])[0]) - expected).max() > 1e-3


def test_a_stack_on_a_quantised_base_writes_no_weight(sd1_folder, files):
    base = BaseModel(sd1_folder, quantize="int8")
    stacked, _ = load_adapted(base, uses_of(files))
    (image,) = generate_images(stacked, PROMPT, [3], QUICK)
    plain, _ = load_adapted(sd1_folder, uses_of(files))
    (exact,) = generate_images(plain, PROMPT, [3], QUICK)
    (without,) = generate_images(load_components(sd1_folder), PROMPT, [3], QUICK)
    near, far = (np.abs(pixels([image]) - pixels([o])).mean() for o in (exact, without))
    assert near < far / 2


def test_strengths_are_those_of_the_component(sd1_folder, files):
    stacked, _ = load_adapted(sd1_folder, uses_of(files))
    seen = set()
    for component, model in stacked.adaptable().items():
        for number, use in enumerate(uses_of(files)):
            own = use.strengths
            share = own.unet_strength if component == "unet" else own.text_encoder_strength
            for part in layer_adapters(model, name_of(number)):
                assert part.strengths.strength == pytest.approx(own.strength * share)
                assert part.strengths.direction_strength == own.direction_strength
                assert part.strengths.magnitude_strength == own.magnitude_strength
                seen.add((component, number))
    assert len(seen) == 4


def test_what_cannot_be_stacked_is_said(sd1_folder, files):
    with pytest.raises(ValueError, match="alpha is given for several adapters"):
        load_adapted(sd1_folder, uses_of(files), alpha=4.0)
