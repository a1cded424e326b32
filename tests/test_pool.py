"""Adapters that are loaded when asked for and dropped by use; images of a mixed batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dora_diffusion import AdapterPool, SamplingSettings, generate_images, load_components
from dora_diffusion.adapters.inject import layer_adapters
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.generate import load_adapted
from dora_diffusion.models.offload import place

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
    tensors = [t for layer in adapter.values() for t in (layer.down, layer.up, layer.magnitude)]
    return sum(4 * tensor.numel() for tensor in tensors if tensor is not None)


def load_layers(path):
    from dora_diffusion.formats.adapter.file import read_adapter

    return read_adapter(path).layers


@pytest.mark.parametrize("offload", ["none", "model"])
def test_each_image_is_that_of_its_adapter_alone(sdxl_folder, files, offload):
    """Text encoders included; guidance doubles the batch; the base is one of the rows."""
    prompts, seeds = ["a photo of a dog", "a cat", "a dog", "a red toy"], [5, 6, 7, 8]
    wanted = [files[0], None, files[1], (files[2], 0.5)]
    pool = AdapterPool(place(load_components(sdxl_folder), torch.device("cpu"), offload))
    names = pool.names(wanted)
    mixed = pixels(generate_images(pool.components, prompts, seeds, QUICK, adapters=names))
    for row, (prompt, seed, adapter) in enumerate(zip(prompts, seeds, wanted, strict=True)):
        path, strength = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
        alone, _ = load_adapted(sdxl_folder, path, strength=strength, device="cpu")
        expected = pixels(generate_images(alone, prompt, [seed], QUICK))[0]
        assert abs(mixed[row] - expected).max() <= 1
    assert len({image.tobytes() for image in mixed}) == 4
    assert [name and pool.metadata(name).trigger for name in names] == [
        "word1", None, "word2", "word3",
    ]  # fmt: skip


def test_what_is_asked_for_again_is_not_read_again(sdxl_folder, files, monkeypatch):
    pool, read = AdapterPool(load_components(sdxl_folder)), []
    from dora_diffusion import pool as module

    attach = module.attach_file
    monkeypatch.setattr(module, "attach_file", lambda *a, **k: read.append(a[1]) or attach(*a, **k))
    first = pool.names([files[0], files[1], files[0], None])
    assert first[0] == first[2] != first[1]
    assert pool.names([files[1], files[0]]) == [first[1], first[0]]
    assert read == [files[0], files[1]]
    # Another strength is another adapter; so is a file that was written since.
    assert pool.names([(files[0], 0.5)]) != [first[0]]
    write_adapter(files[1], AdapterFile(load_layers(files[1]), AdapterMetadata("sdxl")))
    assert pool.names([files[1]]) != [first[1]]
    assert len(read) == 4


def test_the_longest_unused_leave_when_the_budget_is_exceeded(sdxl_folder, files):
    sizes = [size_of(file) for file in files]
    components = load_components(sdxl_folder)
    base = {name: p.clone() for name, p in components.unet.named_parameters()}
    pool = AdapterPool(components, budget=sizes[0] + sizes[1] + sizes[2] - 1)
    first = pool.names([files[0]])
    second = pool.names([files[1]])
    assert pool.size == sizes[0] + sizes[1]
    assert pool.names([files[0]]) == first
    pool.names([files[2]])
    # The second was not asked for the longest.
    assert pool.size == sizes[0] + sizes[2]
    assert not any(layer_adapters(components.unet, second[0]))
    with pytest.raises(ValueError, match=r"take \d.* MB, and the pool may hold \d.* MB"):
        pool.names(files)
    assert pool.size <= pool.budget
    assert pool.names([files[2], None])[1] is None
    pool.budget = 0
    with pytest.raises(ValueError, match="larger budget"):
        pool.names([files[1]])
    assert pool.size == 0
    assert {name: p.shape for name, p in components.unet.named_parameters()} == {
        name: p.shape for name, p in base.items()
    }
    assert all(torch.equal(p, base[name]) for name, p in components.unet.named_parameters())


def test_one_token_cannot_mean_two_things(sd1_folder, random_adapter, tmp_path):
    layers, made = random_adapter(sd1_folder, components=("unet",), every=9), []
    for number in (0, 1, 2):
        # The first two agree.
        adapter = AdapterFile(layers, AdapterMetadata("sd1"))
        vector = torch.full((32,), 0.1 * max(number, 1))
        adapter = dataclasses.replace(adapter, tokens={"<toy>": {"text_encoder": vector}})
        made.append(write_adapter(tmp_path / f"{number}.safetensors", adapter, "kohya"))
    pool = AdapterPool(load_components(sd1_folder))
    names = pool.names(made[:2])
    with pytest.raises(ValueError, match="has trained the token '<toy>', and so has another"):
        pool.names(made)
    assert pool.names(made[:2]) == names
    assert not any(layer_adapters(pool.components.unet, "pool2"))


def test_what_cannot_be_is_refused(sd1_folder, files, sdxl_folder):
    components = load_components(sd1_folder)
    with pytest.raises(ValueError, match="Stable Diffusion XL"):
        AdapterPool(components).names([files[0]])
    with pytest.raises(ValueError, match="2 adapters for 1 seeds"):
        generate_images(components, "a", [1], QUICK, adapters=[None, None])
    with pytest.raises(ValueError, match="no adapter named 'x'; there are none"):
        generate_images(components, "a", [1], QUICK, adapters=["x"])
