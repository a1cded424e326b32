"""The configuration that this package holds: released shapes, and CLIP's vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.models.configuration import (
    empty_module,
    module_classes,
    released_config,
    released_folder,
)
from dora_diffusion.models.load import load_components

V = "v_prediction"
# Parameters of the released models, as their papers and model cards count them.
PARAMETERS = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sd1-inpainting": {"unet": 859_535_364},
    "sdxl-inpainting": {"unet": 2_567_478_084},
}


@pytest.mark.parametrize(
    ("family", "part", "count"),
    [(f, p, n) for f, parts in PARAMETERS.items() for p, n in parts.items()],
)
def test_released_shapes(family: str, part: str, count: int) -> None:
    of = FAMILIES[family]
    module = empty_module(released_folder(of, V) / part, module_classes(of)[part], of)
    assert sum(parameter.numel() for parameter in module.parameters()) == count
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


def test_a_module_gets_no_values_before_its_weights(
    sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = CLIPTextModelWithProjection.from_pretrained(sdxl_folder / "text_encoder_2")

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("values were drawn for a parameter")

    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    components = load_components(sdxl_folder)
    encoder = components.text_encoders[1]
    for kind in ("named_parameters", "named_buffers"):
        values, wanted = dict(getattr(encoder, kind)()), dict(getattr(stock, kind)())
        assert values.keys() == wanted.keys()
        assert all(torch.equal(values[key], wanted[key]) for key in wanted)


def test_what_differs_between_releases() -> None:
    for prediction, side in (("epsilon", 64), (V, 96)):
        config = released_config(FAMILIES["sd2"], prediction)
        assert config["unet"]["sample_size"] == side
        assert config["scheduler"]["prediction_type"] == prediction
    sdxl = released_config(FAMILIES["sdxl"], "epsilon")
    assert (sdxl["vae"]["scaling_factor"], sdxl["unet"]["sample_size"]) == (0.13025, 128)
    assert released_config(FAMILIES["sd1"], V)["scheduler"]["prediction_type"] == V


# Token numbers of open_clip's own tokenizer, between those of start and end.
TEXTS = {
    "a photo of a sks dog": [320, 1125, 539, 320, 48136, 1929],
    "score_9, 1girl, masterpiece, best quality, (blue eyes:1.2)": [
        4431, 318, 280, 267, 272, 1611, 267, 12066, 267, 949, 3027, 267, 263, 1746, 3095, 281, 272,
        269, 273, 264,
    ],
    "Ünïcödé Straße 東京 привет 😀": [
        6522, 77, 35689, 66, 7255, 67, 4166, 1894, 127, 253, 324, 48338, 21078, 361, 26302, 16370,
        29503, 110, 22176, 141, 480, 7334,
    ],
    "it's the dog's 2,048 things!!! <lora:x:1> don't": [
        585, 568, 518, 1929, 568, 273, 267, 271, 275, 279, 1739, 995, 283, 2179, 320, 281, 343, 281,
        272, 285, 847, 713,
    ],
    "  many   spaces\n and\ttabs ": [1346, 9006, 537, 29163],
}  # fmt: skip


def test_the_tokenizer_is_clips() -> None:
    folder = released_folder(FAMILIES["sdxl"], "epsilon")
    first, second = (
        CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")
    )
    for text, expected in TEXTS.items():
        assert first(text).input_ids == [49406, *expected, 49407]
    assert len(first) == len(second) == 49_408
    assert (first.pad_token, second.pad_token) == ("<|endoftext|>", "!")
    assert first("a", padding="max_length").input_ids == [49406, 320] + 75 * [49407]
    assert second("a", padding="max_length").input_ids == [49406, 320, 49407] + 74 * [0]
    assert first("a " * 99, truncation=True).input_ids == [49406] + 75 * [320] + [49407]


def test_a_file_of_one_of_two_releases_must_say_which(tmp_path: Path) -> None:
    key = "cond_stage_model.model.ln_final.weight"
    save_file({key: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"v_prediction \(as the release of 768 pixels\) or eps.*512"
    ):
        load_components(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"the shapes of a released Stable Diffusion 2"):
        load_components(BaseModel(tmp_path / "x.safetensors", prediction_type="epsilon"))
