"""Several adapters on one model: the merge of the same, by component, layer and over the steps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.config.base import BaseModel
from dora_diffusion.export import export_checkpoint
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.weights import MergeStrengths, Strengths
from dora_diffusion.sampling.generate import generate_images
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from dora_diffusion.sampling.stack import AdapterUse, name_of, parse_schedule, strength_texts

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


def uses_of(files, **changes):
    strengths = (
        MergeStrengths(0.7, text_encoder_strength=0.5),
        MergeStrengths(-0.4, 0.9, 0.8, unet_strength=0.5),
    )
    return [AdapterUse(f, s, **changes) for f, s in zip(files, strengths, strict=True)]


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


def test_strengths_are_those_of_component_and_layer(sd1_folder, files):
    layers = {"unet.up_blocks.*": 0.5, "*attn2*": 0.25, "text_encoder.*": 0.0}
    stacked, _ = load_adapted(sd1_folder, uses_of(files, layers=layers))
    seen = set()
    for component, model in stacked.adaptable().items():
        for path, layer in adapted_layers(model):
            for number, use in enumerate(uses_of(files)):
                if name_of(number) not in layer.adapters:
                    continue
                own = use.strengths
                factor = 0.5 if component == "unet" and path.startswith("up_blocks.") else 1
                factor *= 0.25 if "attn2" in path else 1
                share = own.unet_strength
                if component != "unet":
                    share = own.text_encoder_strength * 0.0
                expected = own.strength * share * factor
                got = layer.adapters[name_of(number)].strengths
                assert got.strength == pytest.approx(expected)
                assert got.direction_strength == own.direction_strength
                assert got.magnitude_strength == own.magnitude_strength
                seen.add((component, number, factor))
    assert len(seen) >= 8


def test_a_schedule_switches_between_steps(sd1_folder, files):
    """By hand: a pipeline whose callback sets the strengths that hold from the next step on."""
    uses = uses_of(files)
    stacked, _ = load_adapted(sd1_folder, uses, clip_skip=0)
    schedules = {"default": [(0.0, 0.4), (0.5, 1.0)], "default_1": [(0, 0), (0.25, 1), (0.75, 0)]}
    by_step = {"default": [0.4, 0.4, 1, 1], "default_1": [0, 1, 1, 0]}
    seeds = [3, 4]  # The second begins as the first did.
    settings = dataclasses.replace(QUICK, steps=4, strength_schedules=schedules)
    images = generate_images(stacked, PROMPT, seeds, settings, batch_size=1)
    parts = [
        (name, part, part.strengths)
        for name in by_step
        for model in stacked.adaptable().values()
        for part in layer_adapters(model, name)
    ]

    def set_step(step):
        for name, part, own in parts:
            factor = by_step[name][min(step, 3)]
            part.strengths = dataclasses.replace(own, strength=own.strength * factor)

    for seed, image in zip(seeds, images, strict=True):
        set_step(0)
        with torch.no_grad():
            (expected,) = stacked.pipeline("euler")(
                PROMPT, num_inference_steps=4, guidance_scale=4.0, output_type="pil",
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=lambda p, step, t, tensors: set_step(step + 1) or tensors,
            ).images  # fmt: skip
        assert np.abs(pixels([image]) - pixels([expected])).max() <= 1
    for _, part, own in parts:
        part.strengths = own
    for constant in (0.4, 1.0):
        constantly = dataclasses.replace(settings, strength_schedules={"default": [(0, constant)]})
        (other,) = generate_images(stacked, PROMPT, seeds[:1], constantly)
        assert np.abs(pixels([other]) - pixels(images[:1])).max() > 1


def test_a_constant_schedule_is_the_strength_and_what_was_set_is_back(sd1_folder, files):
    stacked, _ = load_adapted(sd1_folder, files[0])
    half, _ = load_adapted(sd1_folder, files[0], strength=0.5)
    halved = dataclasses.replace(QUICK, strength_schedules={"default": [(0, 0.5)]})
    images = [
        generate_images(stacked, PROMPT, [3], halved),
        generate_images(half, PROMPT, [3], QUICK),
    ]
    assert np.array_equal(*map(pixels, images))
    adapters = [a for model in stacked.adaptable().values() for a in layer_adapters(model)]
    assert {adapter.strengths for adapter in adapters} == {Strengths()}

    def fail(done, steps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_images(stacked, PROMPT, [3], halved, on_step=fail)
    assert {adapter.strengths for adapter in adapters} == {Strengths()}
    for name, rows in (("default_1", None), ("default", ["default"])):
        settings = dataclasses.replace(QUICK, strength_schedules={name: [(0, 1)]})
        with pytest.raises(ValueError, match=r"no adapter named 'default_1'|are of adapters that"):
            generate_images(stacked, PROMPT, [3], settings, adapters=rows)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("0.5:1", "has its changes at 0.5"),
        ("0:1, 1:0", "has its changes at 0.0 and 1.0|has its changes at 0.0, 1.0"),
        ("0:1, 0.5:1, 0.2:0", "must be in order, from 0 to below 1"),
        ("0:1, 0:0", "must be in order"),
        ("0:1, nan:0", "must be in order"),
        ("0:70", "the strength at 0.0 is 70; it must be between"),
        ("0:nan", "the strength at 0.0 is nan"),
        ("0", "write a share of the steps and a factor"),
        ("", "write a share of the steps"),
        ("a:b", "write a share of the steps"),
        ("0:1:2", "write a share of the steps"),
    ],
)
def test_schedules_that_cannot_be_are_one_line(schedule, message):
    with pytest.raises(ValueError, match=message) as error:
        AdapterUse("x", schedule=parse_schedule(schedule))
    assert "\n" not in str(error.value)


def test_what_cannot_be_stacked_is_said(sd1_folder, files):
    with pytest.raises(ValueError, match=r"'unet\.nothing\*' matches no layer with an adapter"):
        load_adapted(sd1_folder, [AdapterUse(files[0], layers={"unet.nothing*": 1.0})])
    with pytest.raises(ValueError, match="alpha is given for several adapters"):
        load_adapted(sd1_folder, uses_of(files), alpha=4.0)
    with pytest.raises(ValueError, match="the strength at x is 70"):
        AdapterUse(files[0], layers={"x": 70})


def test_strengths_as_texts_are_those_that_are_read_again():
    """As settings: no digit is lost, and a schedule that all share is there once."""
    layers, schedule = {"unet.*": 0.1 + 0.2, "*": 2.0}, [(0.0, 1 / 3), (0.5, 1.0)]
    alike = [AdapterUse(name, layers=layers, schedule=schedule) for name in ("dog", "cat")]
    texts = strength_texts(alike)
    assert texts["layer_strength"] == ["unet.*:0.30000000000000004", "*:2"]
    assert [parse_schedule(text) for text in texts["strength_schedule"]] == [schedule]
    texts = strength_texts([alike[0], AdapterUse("cat")])
    assert [parse_schedule(text) for text in texts["strength_schedule"]] == [schedule, [(0, 1)]]
    assert strength_texts([AdapterUse("dog"), AdapterUse("cat")]) == strength_texts([])
    assert strength_texts([]) == {"layer_strength": [], "strength_schedule": []}
