"""Metric models with random weights, and photos of a subject."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dora_diffusion.toy.benchmark_subjects import find_subject, write_photos

PREPROCESSING = {
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_convert_rgb": True,
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "resample": 3,
}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


def save(model: object, folder: Path, kind: str) -> Path:
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    values = PREPROCESSING | {"image_processor_type": kind}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path) -> Path:
    """A tiny random CLIP with the tokenizer of the tiny pipelines."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("metric") / "tiny-clip"
    shutil.copytree(sd1_folder / "tokenizer", folder)
    words = len(CLIPTokenizer.from_pretrained(folder))
    text = {"vocab_size": words, "hidden_size": 32, "intermediate_size": 64, "eos_token_id": 2}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**LAYERS, "intermediate_size": 64, "image_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    return save(model, folder, "CLIPImageProcessor")


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINOv2."""
    from transformers import Dinov2Config, Dinov2Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Dinov2Model(Dinov2Config(**LAYERS, image_size=32))
    folder = tmp_path_factory.mktemp("metric") / "tiny-dino"
    return save(model, folder, "BitImageProcessor")


@pytest.fixture(scope="session")
def held_out_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos of a subject."""
    folder = tmp_path_factory.mktemp("photos") / "held-out"
    for photo in write_photos(find_subject("cross_mug"), folder)[3:]:
        photo.unlink()
    return folder
