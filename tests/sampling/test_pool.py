"""Adapters that are loaded when asked for and dropped by use; images of a mixed batch."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion import (
    AdapterPool,
    SamplingSettings,
    generate_images,
    load_components,
)
from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.config import ConfigError
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.images import SETTINGS, ImageRequest
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.models.offload import place_model
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.pool import reading_of

QUICK = SamplingSettings(steps=2, guidance_scale=3.0, negative_prompt="red")


@pytest.fixture(scope="module")
def files(sdxl_folder, random_adapter, tmp_path_factory):
    """A DoRA on everything, another, and a LoRA on the UNet alone."""
    folder, made = tmp_path_factory.mktemp("pool"), []
    encoders = ("text_encoder", "text_encoder_2")
    kinds = (("output", encoders), ("output", encoders[:1]), (None, ()))
    for seed, (axis, others) in enumerate(kinds, start=1):
        layers = random_adapter(
            sdxl_folder,
            axis=axis,
            seed=seed,
            components=("unet", *others),
            every=5,
            mixed_ranks=True,
        )
        metadata = AdapterMetadata("sdxl", trigger=f"word{seed}")
        made.append(write_adapter(folder / f"{seed}.safetensors", AdapterFile(layers, metadata)))
    return made


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def size_of(path):
    adapter = load_layers(path)
    parameters = sum(4 * (layer.down.numel() + layer.up.numel()) for layer in adapter.values())
    magnitudes = [layer.magnitude for layer in adapter.values() if layer.magnitude is not None]
    # With what is computed from them: A, g s B, g and (1 - g) b.
    return parameters * (2 if magnitudes else 1) + 4 * 3 * sum(m.numel() for m in magnitudes)


def load_layers(path):
    from dora_diffusion.formats.adapter.file import read_adapter

    return read_adapter(path).layers


@pytest.mark.parametrize(
    ("offload", "quantize"), [("none", "none"), ("model", "none"), ("none", "nf4")]
)
def test_each_image_is_that_of_its_adapter_alone(sdxl_folder, files, offload, quantize):
    """Text encoders included; guidance doubles the batch; the base is one of the rows."""
    prompts, seeds = ["a photo of a dog", "a cat", "a dog", "a red toy"], [5, 6, 7, 8]
    wanted = [files[0], None, files[1], (files[2], 0.5)]
    base = BaseModel(sdxl_folder, quantize=quantize, quantize_convolutions=True)
    pool = AdapterPool(place_model(load_components(base), torch.device("cpu"), offload))
    names = pool.names(wanted)
    mixed = pixels(generate_images(pool.components, prompts, seeds, QUICK, adapters=names))
    for row, (prompt, seed, adapter) in enumerate(zip(prompts, seeds, wanted, strict=True)):
        path, strength = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
        alone, _ = load_adapted(base, path, strength=strength, device="cpu")
        expected = pixels(generate_images(alone, prompt, [seed], QUICK))[0]
        assert abs(mixed[row] - expected).max() <= 1
    assert len({image.tobytes() for image in mixed}) == 4
    triggers = [pool.metadata(adapter).trigger for adapter in wanted]
    assert triggers == ["word1", "", "word2", "word3"]


def test_loading_one_more_looks_at_none_of_those_that_are_there(sdxl_folder, files):
    """A server has hundreds: each is loaded by the calls that the first ones took."""
    pool, calls = AdapterPool(load_components(sdxl_folder)), []

    def count(frame, event, argument):
        calls[-1] += event == "call"

    for number in range(8):
        calls.append(0)
        sys.setprofile(count)
        try:
            pool.names([(files[0], 1 + number / 8)])
        finally:
            sys.setprofile(None)
    assert calls[7] == pytest.approx(calls[2], rel=0.01)


def test_the_longest_unused_leave_when_the_budget_is_exceeded(sdxl_folder, files):
    sizes = [size_of(file) for file in files]
    components = load_components(sdxl_folder)
    base = {name: p.clone() for name, p in components.denoiser.named_parameters()}
    pool = AdapterPool(components, budget=sizes[0] + sizes[1] + sizes[2] - 1)
    first = pool.names([files[0]])
    second = pool.names([files[1]])
    assert pool.size == sizes[0] + sizes[1]
    assert pool.names([files[0]]) == first
    pool.names([files[2]])
    # The second was not asked for the longest.
    assert pool.size == sizes[0] + sizes[2]
    assert not any(layer_adapters(components.denoiser, second[0]))
    with pytest.raises(ValueError, match=r"take \d.* MB, and the pool may hold \d.* MB"):
        pool.names(files)
    assert pool.size <= pool.budget
    assert pool.names([files[2], None])[1] is None
    pool.budget = 0
    with pytest.raises(ValueError, match="larger budget"):
        pool.names([files[1]])
    assert pool.size == 0
    assert {name: p.shape for name, p in components.denoiser.named_parameters()} == {
        name: p.shape for name, p in base.items()
    }
    assert all(torch.equal(p, base[name]) for name, p in components.denoiser.named_parameters())


@pytest.fixture(scope="module")
def customers(sd1_folder, random_adapter, tmp_path_factory):
    """Two adapters that have trained one token, the second one read in ways of its own."""
    folder, made = tmp_path_factory.mktemp("customers"), []
    layers = random_adapter(sd1_folder, components=("unet", "text_encoder"), every=5)
    ways = {"clip_skip": "1", "prediction_type": "v_prediction", "zero_terminal_snr": "True"}
    for number, extra in enumerate(({}, ways)):
        generator = torch.Generator().manual_seed(number)
        vector = torch.randn(2, 32, generator=generator)
        # The model's name, so that its word comes before the model's own.
        metadata = AdapterMetadata("sd1", base_model=sd1_folder.name, extra=extra)
        adapter = AdapterFile(layers, metadata, tokens={"<toy>": {"text_encoder": vector}})
        made.append(write_adapter(folder / f"{number}.safetensors", adapter, "kohya"))
    return made


def test_a_token_and_a_noise_schedule_are_each_adapter_s_own(sd1_folder, customers, monkeypatch):
    """The base, and an adapter of a prompt without the token, see its letters alone."""
    from dora_diffusion.sampling import pool as module

    batches, generate = [], module.generate_images
    monkeypatch.setattr(
        module,
        "generate_images",
        lambda *a, **k: batches.append(len(a[2])) or generate(*a, **k),
    )
    steps, done = dataclasses.replace(QUICK, negative_prompt="a <TOY> dog"), []
    rows = [
        ImageRequest("a <toy> dog", 5 + n, which) for n, which in enumerate([*customers, None] * 2)
    ]
    pool = AdapterPool(load_components(sd1_folder))
    images = pool.generate(rows, steps, batch_size=4, on_step=lambda *seen: done.append(seen))
    mixed = pixels(images)
    assert sorted(batches) == [2, 4]
    assert done[-1] == (12, 12)
    for row, found in zip(rows[:3], mixed[:3], strict=True):
        alone, _ = load_adapted(sd1_folder, row.adapter, device="cpu")
        expected = pixels(generate_images(alone, row.prompt, [row.seed], steps))[0]
        assert abs(found - expected).max() <= 1
    assert len({image.tobytes() for image in mixed}) == 6
    # Seen alone they are read otherwise.
    plain = pixels(generate_images(pool.components, rows[1].prompt, [6], steps,
                                   adapters=pool.names([customers[1]])))[0]  # fmt: skip
    assert abs(plain - mixed[1]).max() > 1
    told = BaseModel(sd1_folder, prediction_type="epsilon", zero_terminal_snr=False)
    asked = AdapterPool(dataclasses.replace(pool.components, asked=told), clip_skip=0)
    assert reading_of(asked.components_for(customers[1])) == reading_of(pool.components)


def test_a_request_has_settings_of_its_own(sd1_folder, tmp_path):
    """Each setting of an image, by iteration: with it, the image is that of sampling with it."""
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(photo)
    Image.fromarray(noise[..., 0]).save(mask)
    over = {"image": str(photo)}
    values = {
        "negative_prompt": "blue", "steps": 3, "guidance_scale": 5.0, "guidance_rescale": 0.7,
        "scheduler": "euler", "width": 48, "height": 48, "image": str(photo),
        "mask_image": str(mask), "denoise": 1.0,
    }  # fmt: skip
    assert [*SETTINGS] == ["prompt", "seed", *values]
    cases = [{}] + [
        {**(over if name in ("mask_image", "denoise") else {}), name: value}
        for name, value in values.items()
    ]
    pool = AdapterPool(load_components(sd1_folder))
    requests = [ImageRequest("a dog", 5, **case) for case in cases]
    found = pool.generate([*requests, requests[0]], QUICK)
    for case, image in zip(cases, found[:-1], strict=True):
        opened = {n: Image.open(v) for n, v in case.items() if "image" in n}
        settings = dataclasses.replace(QUICK, **{**case, **opened})
        (expected,) = generate_images(pool.components, "a dog", [5], settings)
        assert image.size == expected.size
        assert abs(pixels([image]) - pixels([expected])).max() <= 1, case
    assert len({image.tobytes() for image in found}) == len(cases)
    with pytest.raises(ConfigError, match="the image of 'a cat' has no seed"):
        pool.generate([ImageRequest("a cat")])


def test_places_of_tokens_that_left_are_taken_again(sd1_folder, customers):
    components = load_components(sd1_folder)
    pool = AdapterPool(components, budget=0)
    for file in customers * 2:
        with pytest.raises(ValueError, match="larger budget"):
            pool.names([file])
    table = components.text_encoders[0].get_input_embeddings()
    assert (len(table.rows), len(table.free), table.own) == (2, 2, {})


def test_norms_are_computed_when_an_adapter_is_first_used(sd1_folder, customers, monkeypatch):
    from dora_diffusion.adapters import scope

    made, make_scales = [], scope.make_scales
    monkeypatch.setattr(scope, "make_scales", lambda *a: made.append(len(a[0])) or make_scales(*a))
    pool = AdapterPool(load_components(sd1_folder))
    rows = [ImageRequest("a dog", 5), ImageRequest("a dog", 6, customers[0])]
    first, counted = pixels(pool.generate(rows, QUICK)), len(made)
    assert counted > 0
    assert np.array_equal(pixels(pool.generate(rows, QUICK)), first)
    pool.generate([*rows, ImageRequest("a cat", 5, (customers[0], Strengths(1, 0.5, 0.5)))], QUICK)
    other = len(made)
    assert other == 2 * counted
    pool.generate([ImageRequest("a cat", 5, (customers[0], Strengths(1, 0.5, 0.5)))], QUICK)
    assert len(made) == other
    with torch.no_grad():
        next(layer_adapters(pool.components.denoiser, "pool0")).up.mul_(2)
    changed = pixels(pool.generate(rows, QUICK))
    assert made[other:] == [1]
    assert np.array_equal(changed[0], first[0])
    assert not np.array_equal(changed[1], first[1])


def test_what_cannot_be_is_refused(sd1_folder, files, sdxl_folder):
    components = load_components(sd1_folder)
    with pytest.raises(ValueError, match="Stable Diffusion XL"):
        AdapterPool(components).names([files[0]])
    with pytest.raises(ValueError, match="2 adapters for 1 seeds"):
        generate_images(components, "a", [1], QUICK, adapters=[None, None])
    with pytest.raises(ValueError, match="no adapter named 'x'; there are none"):
        generate_images(components, "a", [1], QUICK, adapters=["x"])
