"""Runs on a quantised base: the same bits as on a model that has the dequantised weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.models.load import load_components
from dora_diffusion.numerics.quantised import PackedWeight
from dora_diffusion.training.recipe import train
from tests.refusal import refused
from tests.training.helpers import make_config

ALL = {"quantize": "nf4", "quantize_convolutions": True}
PRIOR = {"with_prior_preservation": True}
TEXT = {"train_text_encoder": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "int8, checkpointing, images": {
        "quantize": "int8", "gradient_checkpointing": True, **TEXT, "num_validation_images": 1,
    },
    "nf4, lora, patterns": {
        "quantize": "nf4",
        "use_dora": False,
        "rank_pattern": {"to_k": 3},
        "alpha_pattern": {"to_k": 6.0},
        "lr_pattern": {"mid_block.*": 5e-3},
    },
    "low precision, prior": {"mixed_precision": "bf16", **TEXT, **PRIOR},
    "class images, input axis": {
        **PRIOR, "prior_preservation_mode": "images", "num_class_images": 2, "norm_axis": "input",
    },
    "adalora, masks": {
        "parametrization": "adalora", "rank": 4, "allocation_warmup": 0, "masked_loss": True,
    },
    "vera, words": {
        "parametrization": "vera", "train_text_encoder_ti": True, "token": "mug",
        "instance_prompt": "a mug",
    },
    "pissa, checkpointing": {"init": "pissa", "gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "start, dropout": {
        "init_adapter": "made below", "targets": ["full"], "rank": 4, "conv_rank": 4,
        "lora_dropout": 0.3,
    },
}  # fmt: skip
"""Settings that each stand in a run, with convolutions unless a run says how it is quantised."""


def quantised_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(getattr(m, "weight", None), PackedWeight)]


@pytest.fixture(scope="module")
def dequantised(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the model that has the dequantised weights, in a dtype."""
    made: dict[str, Path] = {}

    def folder(config: TrainConfig) -> Path:
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        name = f"{config.quantize}-{config.quantize_convolutions}-{dtype}"
        if name not in made:
            components = load_components(config.base_model, dtype=dtype)
            for module in components.adaptable().values():
                for layer in quantised_modules(module):
                    dense = layer.weight.data.dense()
                    layer.weight = nn.Parameter(dense, requires_grad=False)
            made[name] = tmp_path_factory.mktemp("dense") / "model"
            components.pipeline().save_pretrained(made[name])
        return made[name]

    return folder


LONG = ("accumulation", "adalora, masks", "class images, input axis")
"""Settings that change nothing of how a weight is read: in the long suite."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in SETTINGS]
)
def test_a_run_is_that_of_the_dequantised_model(
    name: str,
    sd1_folder: Path,
    small_photos: Path,
    tmp_path: Path,
    dequantised: Any,
    random_adapter: Any,
) -> None:
    settings = {**ALL, "max_train_steps": 2, **SETTINGS[name]}
    if "quantize" in SETTINGS[name]:
        settings["quantize_convolutions"] = False
    photos = Path(shutil.copytree(small_photos, tmp_path / "photos"))
    for photo in photos.glob("*.jpg") if "masked_loss" in settings else ():
        half = Image.new("L", Image.open(photo).size)
        half.paste(255, (0, 0, half.width // 2, half.height))
        half.save(photo.with_suffix(".mask.png"))
    if "init_adapter" in settings:
        layers = random_adapter(sd1_folder, components=("unet",))
        file = AdapterFile(layers, AdapterMetadata("sd1", base_model=sd1_folder.name))
        settings["init_adapter"] = str(write_adapter(tmp_path / "adapter", file))
    config = make_config(sd1_folder, photos, tmp_path / "quantised", **settings)
    settings |= {"quantize": "none", "quantize_convolutions": False}
    other = make_config(dequantised(config), photos, tmp_path / "dense", **settings)
    found, wanted = train(config), train(other)
    for file in ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors"):
        if (wanted.output_dir / file).exists():
            ours, theirs = (load_file(run.output_dir / file) for run in (found, wanted))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    images = [sorted((run.output_dir / "samples").rglob("*.png")) for run in (found, wanted)]
    assert bool(images[0]) == ("num_validation_images" in settings)
    for own, same in zip(*images, strict=True):
        assert np.array_equal(np.asarray(Image.open(own)), np.asarray(Image.open(same)))


def test_what_is_quantised(sd1_folder: Path) -> None:
    plain = load_components(sd1_folder)
    for convolutions in (False, True):
        base = BaseModel(sd1_folder, quantize="nf4", quantize_convolutions=convolutions)
        components = load_components(base)
        kinds = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
        for name, module in components.modules().items():
            for path, layer in module.named_modules():
                is_packed = isinstance(getattr(layer, "weight", None), PackedWeight)
                assert is_packed == (isinstance(layer, kinds) and name != "vae"), path
        assert components.identity() != plain.identity()


def test_weights_that_train_are_not_quantised(sd1_folder: Path, small_photos: Path) -> None:
    with refused("quantize", "method full"):
        make_config(sd1_folder, small_photos, "out", method="full", quantize="nf4")
