"""A step's conditioning, against what Diffusers' own pipelines compute when they sample."""

from __future__ import annotations

import json
import shutil
import warnings

import diffusers
import pytest
import torch

from dora_diffusion.adapters.inject import adapter_parameters, inject_adapters
from dora_diffusion.config import AdapterConfig
from dora_diffusion.generate import SamplingSettings, generate_images
from dora_diffusion.models.load import load_components
from dora_diffusion.training.conditioning import Conditioner

CAPTIONS = ["a photo of a sks dog", "", "a red toy", ""]


FAMILIES = ("sd1_folder", "sd2_folder", "sdxl_folder", "sdxl_encoded")


@pytest.fixture
def folder(request, tmp_path):
    """A pipeline folder; ``sdxl_encoded`` is an SDXL whose guidance encodes the empty prompt."""
    if request.param != "sdxl_encoded":
        return request.getfixturevalue(request.param)
    folder = shutil.copytree(request.getfixturevalue("sdxl_folder"), tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(
        json.dumps(index | {"force_zeros_for_empty_prompt": False}), encoding="utf-8"
    )
    return folder


def expected(folder, captions):
    """Diffusers' embeddings: of each caption, and of guidance where the caption was dropped."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    rows = []
    for caption in captions:
        encoded = pipeline.encode_prompt(
            caption or "anything", device="cpu", num_images_per_prompt=1,
            do_classifier_free_guidance=True, negative_prompt=None,
        )  # fmt: skip
        half = len(encoded) // 2  # (hidden, negative) or (hidden, negative, pooled, negative)
        rows.append([encoded[2 * part + (not caption)] for part in range(half)])
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_a_dropped_caption_is_conditioned_as_guidance_samples_it(folder, trains):
    conditioning = Conditioner(load_components(folder), trains)(CAPTIONS)
    found = [tensor.detach() for tensor in conditioning.tensors().values()]
    for ours, theirs in zip(found, expected(folder, CAPTIONS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("folder", "learns"),
    [("sd1_folder", True), ("sdxl_folder", False), ("sdxl_encoded", True)],
    indirect=["folder"],
)
def test_text_encoders_learn_from_a_dropped_caption_only_where_it_is_encoded(folder, learns):
    """Beside a kept caption, whose gradient must be what it is without the dropped one."""
    components = load_components(folder)
    encoders = components.text_encoders
    for encoder in encoders:
        inject_adapters(encoder, AdapterConfig(targets=("text-encoder-attention",), rank=2))
    parameters = [p for encoder in encoders for p in adapter_parameters(encoder)]
    condition = Conditioner(components, trains=True)

    def gradients(captions):
        hidden = condition(captions).encoder_hidden_states
        grads = torch.autograd.grad(
            hidden.square().sum(), parameters, allow_unused=True, materialize_grads=True
        )
        return torch.cat([grad.flatten() for grad in grads])

    kept, both, dropped = gradients(["a dog"]), gradients(["a dog", ""]), gradients([""])
    assert kept.abs().max() > 0
    torch.testing.assert_close(both, kept + dropped, rtol=1e-4, atol=1e-4)
    assert (dropped.abs().max() > 0) == learns


@pytest.mark.parametrize("folder", ["sdxl_folder", "sdxl_encoded"], indirect=True)
def test_our_sampler_guides_with_what_a_dropped_caption_trains(folder):
    """The same images as a pipeline that is handed the trained embeddings as its negative."""
    components = load_components(folder)
    dropped = Conditioner(components, trains=False)([""])
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    hidden, _, pooled, _ = pipeline.encode_prompt("a red toy", do_classifier_free_guidance=False)
    theirs = pipeline(
        prompt_embeds=hidden, pooled_prompt_embeds=pooled,
        negative_prompt_embeds=dropped.encoder_hidden_states,
        negative_pooled_prompt_embeds=dropped.pooled,
        num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    settings = SamplingSettings(steps=3, guidance_scale=4.0, negative_prompt="")
    ours = generate_images(components, "a red toy", [5], settings)
    assert ours[0].tobytes() == theirs[0].tobytes()


def test_captions_are_warned_of_once_and_not_kept_for_ever(sd1_folder, monkeypatch):
    from dora_diffusion.models.load import load_components
    from dora_diffusion.training import conditioning

    components, long = load_components(str(sd1_folder)), "mug " * 200
    trains = conditioning.Conditioner(components, trains=True)
    with pytest.warns(UserWarning, match="longer than the model's"):
        trains([long, "a mug"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trains(["a mug", long])
    monkeypatch.setattr(conditioning, "KNOWN_CAPTIONS", 2)
    kept = conditioning.Conditioner(components, trains=False)
    whole = kept(["a", "b", "c", "a"]).encoder_hidden_states
    assert len(kept._known) == 2
    assert torch.equal(whole[0], whole[3])
    assert torch.equal(kept(["a"]).encoder_hidden_states, whole[:1])
