"""Sampling: seeds, batches, strengths, the state of the modules, and images that say their make.

The reference of an image is Diffusers' own pipeline, loaded from the folder.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dora_diffusion.adapters.inject import (
    adapter_parameters,
    disabled,
    inject_adapters,
    layer_adapters,
)
from dora_diffusion.adapters.state import save_adapter
from dora_diffusion.config import AdapterConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.schedulers import SCHEDULERS
from dora_diffusion.formats.adapter.file import AdapterMetadata
from dora_diffusion.models.components import Components
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.sampling.conditioning import lacks_trigger, unread_syntax
from dora_diffusion.sampling.generate import BrokenImageError, generate_images
from dora_diffusion.sampling.load import load_adapted
from dora_diffusion.sampling.settings import SamplingSettings
from tests.models.test_text import by_hand
from tests.refusal import refused

QUICK = SamplingSettings(steps=3, guidance_scale=4.0)
PROMPT = "a photo of a sks dog"


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def make_adapter(components, path, *, text_encoders=False):
    """An adapter with random, noticeable weights, saved from a copy of the model."""
    generator = torch.Generator().manual_seed(7)
    parts = components.adaptable() if text_encoders else {"unet": components.denoiser}
    for name, model in parts.items():
        targets = ("attention+conv",) if name == "unet" else ("text-encoder-attention",)
        inject_adapters(model, AdapterConfig(targets=targets, rank=2), generator=generator)
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise * parameter.std().clamp_min(0.2))
    return save_adapter(parts, path, metadata=AdapterMetadata("sd1", trigger="sks dog"))


@pytest.fixture(scope="module")
def sd1(sd1_folder):
    return load_components(sd1_folder)


@pytest.fixture(scope="module")
def sd1_adapter(sd1_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    return make_adapter(load_components(sd1_folder), folder, text_encoders=True)


@pytest.mark.parametrize("family", ["sd1_folder", "sd2_folder", "sdxl_folder"])
def test_a_seed_gives_the_same_image_alone_and_in_any_batch(family, request):
    components = load_components(request.getfixturevalue(family))
    together = pixels(generate_images(components, PROMPT, [5, 6, 7], QUICK, batch_size=2))
    alone = pixels([generate_images(components, PROMPT, [s], QUICK)[0] for s in (5, 6, 7)])
    # Products of larger batches are rounded differently: a step of 1 in 255.
    assert np.abs(together - alone).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 10


def test_prompts_may_differ_within_a_batch(sd1):
    settings = SamplingSettings(steps=3, guidance_scale=4.0, negative_prompt="a cat")
    prompts = [PROMPT, "a red toy", PROMPT]
    mixed = pixels(generate_images(sd1, prompts, [5, 6, 7], settings, batch_size=2))
    for row, (prompt, seed) in enumerate(zip(prompts, (5, 6, 7), strict=True)):
        alone = pixels(generate_images(sd1, prompt, [seed], settings))
        assert np.abs(mixed[row] - alone[0]).max() <= 1
    assert np.abs(mixed[0] - mixed[1]).max() > 1
    with pytest.raises(ValueError, match="2 prompts for 1 seeds"):
        generate_images(sd1, prompts[:2], [5], settings)


def test_images_are_those_of_the_diffusers_pipeline(sd1_folder, sd1):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(sd1_folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPT,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(11),
    ).images
    assert np.array_equal(pixels(generate_images(sd1, PROMPT, [11], QUICK)), pixels(expected))


@pytest.mark.parametrize(("family", "clip_skip"), [("sd1_folder", 1), ("sdxl_folder", 0)])
def test_prompts_are_read_as_the_adapter_says(family, clip_skip, request, tmp_path):
    """Of two chunks and with clip skip: the pipeline's image of states computed by transformers."""
    folder = request.getfixturevalue(family)
    base = load_components(folder)
    extra = {"max_token_length": "150", "clip_skip": str(clip_skip)}
    metadata = AdapterMetadata(base.family.name, extra=extra)
    inject_adapters(base.denoiser, AdapterConfig(rank=2, targets=("cross-attention",)))
    components, _ = load_adapted(
        folder, save_adapter({"unet": base.denoiser}, tmp_path, metadata=metadata)
    )
    assert (components.clip_skip, components.max_token_length) == (clip_skip, 150)
    prompt = PROMPT + " on the red backpack" * 20
    texts = {"": by_hand(base, prompt, clip_skip), "negative_": by_hand(base, "a cat")}
    embeds = {
        f"{sign}{part}": torch.cat([states, states], dim=1)
        if part == "prompt_embeds" and states.shape[1] == 77
        else states
        for sign, text in texts.items()
        for part, states in (
            ("prompt_embeds", text.encoder_hidden_states),
            ("pooled_prompt_embeds", text.pooled),
        )
        if states is not None
    }
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
    generator = torch.Generator().manual_seed(11)
    expected = base.pipeline()(**embeds, **options, generator=generator).images
    settings = SamplingSettings(steps=2, guidance_scale=4.0, negative_prompt="a cat")
    (image,) = generate_images(components, prompt, [11], settings)
    assert np.abs(np.asarray(image) - 255 * expected[0]).max() <= 1
    # What is given counts more than what the file says.
    plain, _ = load_adapted(folder, tmp_path, clip_skip=0, max_token_length=75)
    assert (plain.clip_skip, plain.max_token_length) == (0, 75)
    with pytest.warns(UserWarning, match="the model will not see the end"):
        (cut,) = generate_images(plain, prompt, [11], settings)
    assert np.abs(np.asarray(cut, np.int16) - np.asarray(image, np.int16)).max() > 3


def test_strength_zero_is_the_base_bit_for_bit(sd1_folder, sd1, sd1_adapter):
    base = pixels(generate_images(sd1, PROMPT, [3], QUICK))
    adapted, metadata = load_adapted(sd1_folder, sd1_adapter)
    off, _ = load_adapted(sd1_folder, sd1_adapter, strength=0.0)
    changed = pixels(generate_images(adapted, PROMPT, [3], QUICK))
    assert metadata.trigger == "sks dog"
    assert np.abs(changed - base).max() > 3
    assert np.array_equal(pixels(generate_images(off, PROMPT, [3], QUICK)), base)
    with disabled(*adapted.adaptable().values()):
        assert np.array_equal(pixels(generate_images(adapted, PROMPT, [3], QUICK)), base)


def test_the_knobs_reach_every_layer(sd1_folder, sd1_adapter):
    components, _ = load_adapted(sd1_folder, sd1_adapter, strength=Strengths(0.5, 0.25, 0.75))
    for model in components.adaptable().values():
        strengths = {adapter.strengths for adapter in layer_adapters(model)}
        assert strengths == {Strengths(0.5, 0.25, 0.75)}


def test_an_adapter_that_does_not_fit_is_refused(sdxl_folder, sd1_adapter):
    with pytest.raises(
        ValueError,
        match=r"made for Stable Diffusion 1 \(sd1\), the base is Stable Diffusion XL \(sdxl\)",
    ):
        load_adapted(sdxl_folder, sd1_adapter)


def test_training_mode_and_norm_caches_are_restored(sd1_folder, sd1_adapter):
    components, _ = load_adapted(sd1_folder, sd1_adapter)
    components.denoiser.train()
    generate_images(components, PROMPT, [1], QUICK)
    assert components.denoiser.training
    assert not components.vae.training
    routes = [getattr(module, "route", None) for module in components.denoiser.modules()]
    assert routes == [None] * len(routes)

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_images(components, PROMPT, [1], QUICK, on_step=fail)
    assert components.denoiser.training


def test_sizes_and_the_negative_prompt(sd1):
    settings = SamplingSettings(steps=2, width=48, height=80)
    image = generate_images(sd1, PROMPT, [1], settings)[0]
    assert image.size == (48, 80)
    assert generate_images(sd1, PROMPT, [1], QUICK)[0].size == (64, 64)
    steered = SamplingSettings(steps=2, width=48, height=80, negative_prompt="a red cat")
    assert not np.array_equal(pixels([image]), pixels(generate_images(sd1, PROMPT, [1], steered)))


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("steps", 0, "0; it must be at least 1"), ("steps", 1001, "1001; it must be at most 1000"),
        *((name, value, words) for name in ("width", "height") for value, words in (
            (0, "0; it must be at least 16"), (-8, "-8; it must be at least 16"),
            (8200, "8200; it must be at most 8192"), (20, "20; it must be a multiple of 8"),
            (500, "500; it must be a multiple of 8, such as 496"))),
        *((name, value, f"{value}; it must {problem}")
          for name in ("guidance_scale", "guidance_rescale")
          for value, problem in ((-1, "not be negative"), (math.nan, "be a finite number"))),
        ("guidance_scale", math.inf, "inf; it must be a finite number"),
        ("guidance_rescale", 1.5, "1.5; it must be at most 1"),
        ("scheduler", "magic", "'magic'; it must be one of "),
    ],
)  # fmt: skip
def test_settings_check_themselves(setting, value, words):
    with refused(setting, words):
        SamplingSettings(**{setting: value})


def test_a_prompt_without_the_trigger_is_told():
    facts = AdapterMetadata(trigger="sks dog")
    assert lacks_trigger("a photo of a dog", facts)
    assert not lacks_trigger("A photo of a SKS dog, at night", facts)
    assert not lacks_trigger("a photo of a dog", AdapterMetadata())


def test_a_black_image_is_refused_only_where_that_is_asked(sd1_folder, monkeypatch):
    components = load_components(sd1_folder)
    settings = SamplingSettings(steps=1)
    decode = type(components.vae).decode

    def black(self, *args, **kwargs):
        (pixels,) = decode(self, *args, **kwargs)
        return (torch.full_like(pixels, -2.0),)

    monkeypatch.setattr(type(components.vae), "decode", black)
    (image,) = generate_images(components, "a dog", [3], settings)
    assert image.getextrema() == ((0, 0),) * 3
    with pytest.raises(BrokenImageError, match="the image of seed 4 is black all over"):
        generate_images(components, "a dog", [4], settings, require_finite=True)


def test_the_model_goes_to_the_device_that_training_would_take(
    monkeypatch: pytest.MonkeyPatch, sd1_folder: Path
) -> None:
    moved: list[object] = []
    monkeypatch.setattr("dora_diffusion.sampling.load.default_device", lambda: "meta")
    monkeypatch.setattr(Components, "to", lambda self, device: moved.append(device))
    load_adapted(str(sd1_folder))
    load_adapted(str(sd1_folder), device="cpu")
    assert [str(device) for device in moved] == ["meta", "cpu"]


def test_zero_terminal_snr_samples_as_its_paper_says(sdxl_folder):
    """DDIM over the rescaled schedule with rescaled guidance, written out (arXiv:2305.08891)."""
    components = load_components(
        BaseModel(sdxl_folder, prediction_type="v_prediction", zero_terminal_snr=True)
    )
    steps, scale, share, seed = 4, 5.0, 0.7, 3
    settings = SamplingSettings(steps, scale, "ddim", guidance_rescale=share)
    (image,) = generate_images(components, PROMPT, [seed], settings)
    # Algorithm 1: shift the root of alpha_bar so that it ends at 0, and scale its start back.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    alpha_bar = (((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2).float()
    torch.testing.assert_close(components.scheduler.alphas_cumprod, alpha_bar, rtol=1e-4, atol=1e-7)
    timesteps = [1000 - 1000 * i // steps - 1 for i in range(steps)]
    assert timesteps[0] == 999
    pipeline = components.pipeline()
    states, _, pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    added = {"text_embeds": torch.cat([0 * pooled, pooled])}
    added["time_ids"] = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for number, t in enumerate(timesteps):
            both = components.denoiser(
                torch.cat([latents] * 2),
                t,
                torch.cat([0 * states, states]),
                added_cond_kwargs=added,
            ).sample
            plain, wanted = both.chunk(2)
            guided = plain + scale * (wanted - plain)
            back = guided * wanted.std() / guided.std()
            v = share * back + (1 - share) * guided
            a = alpha_bar[t]
            clean, noise = (
                a.sqrt() * latents - (1 - a).sqrt() * v,
                a.sqrt() * v + (1 - a).sqrt() * latents,
            )
            last = number + 1 == steps
            b = alpha_bar[0] if last else alpha_bar[timesteps[number + 1]]
            latents = b.sqrt() * clean + (1 - b).sqrt() * noise
        decoded = components.vae.decode(latents / components.vae.config.scaling_factor).sample
    expected = (decoded[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
    difference = np.abs(np.asarray(image, dtype=np.float32) - expected.numpy())
    assert difference.max() <= 1.01
    plain = generate_images(components, PROMPT, [seed], SamplingSettings(steps, scale, "ddim"))
    assert np.abs(pixels([image]) - pixels(plain)).max() > 3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_zero_terminal_snr_begin_at_pure_noise(sdxl_folder, name):
    components = load_components(
        BaseModel(sdxl_folder, prediction_type="v_prediction", zero_terminal_snr=True)
    )
    if name in ("pndm", "heun"):
        with pytest.raises(ValueError, match="does not support this model's noise schedule"):
            components.sampling_scheduler(name)
        return
    scheduler = components.sampling_scheduler(name)
    scheduler.set_timesteps(4)
    assert int(scheduler.timesteps[0]) == 999
    settings = SamplingSettings(4, 3.0, name)
    (image,) = generate_images(components, PROMPT, [0], settings, require_finite=True)
    assert np.asarray(image).std() > 2, "neither black nor of one colour"


def test_a_model_whose_own_scheduler_cannot_follow_samples_by_another(sd1_folder):
    components = load_components(
        BaseModel(sd1_folder, prediction_type="v_prediction", zero_terminal_snr=True)
    )
    assert components.scheduler_config["_class_name"] == "PNDMScheduler"
    assert type(components.sampling_scheduler()).__name__ == "DDIMScheduler"


def test_guidance_rescale_is_refused_where_there_is_none(sd1_inpainting_folder):
    components = load_components(sd1_inpainting_folder)
    with refused("guidance_rescale", "is not in Diffusers' pipeline of"):
        generate_images(components, PROMPT, [0], SamplingSettings(1, guidance_rescale=0.5))


# Syntax of A1111 and ComfyUI -> what of the message names it.
SYNTAX = {
    "a (red:1.3) dog": "(word:1.2) and", "a red BREAK dog": "(word:1.2) and",
    "a dog AND a cat": "AND, which", "a dog\nAND\na cat:0.5": "AND, which",
    "a [red:blue:0.5] dog": "[a:b:0.5] and", "a [red|blue] dog": "[a:b:0.5] and",
    "a [red::5] dog": "[a:b:0.5] and", "a embedding:mug dog": "embedding:NAME",
    "a {red|blue} dog": "{a|b} and", "a __colour__ dog": "{a|b} and",
    "SAND, ANDY and an embedding: a dog": "", r"a \(red\) dog (brown), [old], a:b": "",
}  # fmt: skip


@pytest.mark.parametrize("prompt", SYNTAX)
def test_syntax_of_other_programs_is_named(prompt):
    named = SYNTAX[prompt]
    assert [kind.startswith(named) for kind in unread_syntax(prompt)] == [True] * bool(named)


def test_each_prompt_is_told_once_of_syntax_that_is_read_as_text(sd1_folder):
    components = load_components(sd1_folder)
    settings = SamplingSettings(steps=1, width=16, height=16)
    with pytest.warns(UserWarning, match="syntax of web UIs") as said:
        generate_images(components, ["a dog AND a cat"] * 2, [0, 1], settings)
    assert [str(warning.message) for warning in said] == [
        "syntax of web UIs is read as text here (AND, which combines prompts): 'a dog AND a cat'"
    ]
