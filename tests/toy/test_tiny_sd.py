"""The shipped model: an ordinary pipeline that opens offline, keeps identity, obeys prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dora_diffusion.models.embedded import model_folder


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(model_folder("tiny-sd"), local_files_only=True)


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"choose tiny-sd or tiny-sdxl, not 'huge-sd'"):
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
    merges = [
        tuple(line.split())
        for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ]
    classic = CLIPTokenizer(
        vocab=json.loads((folder / "vocab.json").read_text(encoding="utf-8")), merges=merges
    )
    text = "a photo of a sks mug, qwxv in front of a brick wall"
    assert classic(text).input_ids == pipeline.tokenizer(text).input_ids
