"""The shipped model: an ordinary pipeline that opens offline, keeps identity, obeys prompts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from dora_diffusion.embedded import model_folder
from dora_diffusion.embedded.instrument import Instrument, load_instrument
from dora_diffusion.embedded.pretrain.card import measure_prompts, measure_vae
from dora_diffusion.embedded.pretrain.instrument import measure_classifier, measure_embedder


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(model_folder("tiny-sd"), local_files_only=True)


@pytest.fixture(scope="module")
def instrument() -> Instrument:
    return load_instrument()


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"'huge-sd'.*tiny-sd"):
        model_folder("huge-sd")


def test_the_folder_is_small_and_in_float16() -> None:
    from safetensors import safe_open

    files = list(model_folder("tiny-sd").rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 15e6
    for file in files:
        with safe_open(file, "pt") as weights:
            assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_it_is_stable_diffusion_of_diffusers_own_classes(pipeline: Any) -> None:
    kinds = {name: type(part).__name__ for name, part in pipeline.components.items()}
    assert kinds["unet"] == "UNet2DConditionModel"
    assert kinds["vae"] == "AutoencoderKL"
    assert kinds["text_encoder"] == "CLIPTextModel"
    assert kinds["tokenizer"] == "CLIPTokenizer"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels


@pytest.mark.parametrize("text", ["Ünïcode 漢字 🙂", "xyzzy 42!", "", "a robot on mars"])
def test_any_text_has_tokens_and_comes_back(pipeline: Any, text: str) -> None:
    tokenizer = pipeline.tokenizer
    ids = tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == tokenizer.model_max_length == 32
    back = tokenizer.decode(ids, skip_special_tokens=True)
    assert back.replace(" ", "") == text.lower().replace(" ", "")


def test_the_trigger_word_and_the_worlds_words_are_single_tokens(pipeline: Any) -> None:
    for word in ("sks", "mug", "teapot", "striped", "purple", "toy", "snow", "brick"):
        assert pipeline.tokenizer.tokenize(word) == [word + "</w>"]


def test_the_classic_tokenizer_files_agree_with_the_fast_one(pipeline: Any) -> None:
    from transformers import CLIPTokenizer

    folder = model_folder("tiny-sd") / "tokenizer"
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    classic = CLIPTokenizer(vocab=json.loads((folder / "vocab.json").read_text()), merges=merges)
    text = "a photo of a sks mug, qwxv in front of a brick wall"
    assert classic(text).input_ids == pipeline.tokenizer(text).input_ids


def test_judges_know_the_world_on_fresh_renders(instrument: Instrument) -> None:
    accuracy = measure_classifier(instrument.classifier, 150)
    assert min(accuracy[name] for name in ("kind", "color", "pattern", "background")) >= 0.95
    subjects = measure_embedder(instrument.embedder, 60)
    assert subjects["same_subject"] >= 0.8
    assert subjects["other_subject"] <= 0.3
    assert subjects["retrieval"] >= 0.9


def test_the_autoencoder_keeps_new_subjects_themselves(
    pipeline: Any, instrument: Instrument
) -> None:
    measured = measure_vae(pipeline.vae, instrument, 40)
    assert measured["psnr"] >= 32
    assert measured["self"] >= 0.9
    assert measured["identity"] >= 0.93 * measured["identity_ceiling"]


def test_latents_have_unit_variance(pipeline: Any) -> None:
    from dora_diffusion.embedded.pretrain.data import to_pixels
    from dora_diffusion.embedded.pretrain.vae import held_out_subject_pictures

    with torch.no_grad():
        latents = pipeline.vae.encode(to_pixels(held_out_subject_pictures(40))).latent_dist.mode()
    assert 0.8 < float(latents.std()) * pipeline.vae.config.scaling_factor < 1.25


def test_it_draws_what_prompts_say(pipeline: Any, instrument: Instrument) -> None:
    accuracy = measure_prompts(pipeline, instrument, 16)
    assert accuracy["kind"] >= 0.85
    assert accuracy["color"] >= 0.85
    assert accuracy["background"] >= 0.9
    assert accuracy["all"] >= 0.7


def test_one_seed_gives_one_picture(pipeline: Any) -> None:
    from dora_diffusion.embedded.pretrain.card import generate

    first, second = (np.asarray(generate(pipeline, ["a red mug"], 5)[0]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
