"""Every feature with every other: excluded with its reason, or resumed to the bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.features.feature import Feature
from dora_diffusion.config.train import features_of, settings_by_name
from dora_diffusion.formats.adapter.file import AdapterFile, AdapterMetadata, write_adapter
from dora_diffusion.training.recipe import train
from tests.training.helpers import assert_same_adapter, compile_without_compiler

ALL = {type(one).__name__.removesuffix("Feature"): one for one in features_of(TrainConfig)}
# What a feature needs besides the setting that turns it on.
WITH: dict[str, dict[str, Any]] = {
    "ClassImages": {"prior_preservation_mode": "images", "num_class_images": 2},
    "ImageFree": {"prior_preservation_mode": "image-free"},
    "Unmasked": {"masked_loss": True, "unmasked_prior": 0.5},
    "Words": {"token": "zwq", "instance_prompt": "a photo of a zwq mug"},
    "Slider": {
        "target": ["a mug"], "positive": ["a red mug"], "negative": ["a dog"],
        "num_class_images": 3, "instance_data_dir": None, "instance_prompt": None,
    },
    "AdaLora": {"allocation_warmup": 0, "allocation_interval": 1},
    "Ema": {"ema_decay": 0.5},
    "SampleModel": {"sample_model": "{base}", "num_validation_images": 1},
    "Assistant": {"assistant_adapter": "{lora}"},
    "HeldOut": {"validation_split": 1.0, "keep_best": True, "validation_loss_steps": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_without_compiler(monkeypatch, "eager")


def turned_on(name: str, one: Feature) -> dict[str, Any]:
    """The settings that turn a feature on."""
    setting = settings_by_name()[one.on.setting]
    value = next(iter(one.on.values), True)
    return {setting.name: value} | WITH.get(name, {})


def values_of(first: str, second: str, places: dict[str, Path]) -> dict[str, Any]:
    values = turned_on(first, ALL[first]) | turned_on(second, ALL[second])
    return {
        name: value.format_map(places) if isinstance(value, str) else value
        for name, value in values.items()
    }


@pytest.fixture(scope="module")
def lora(
    sd1_folder: Path, random_adapter: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A LoRA of the denoiser."""
    layers = random_adapter(sd1_folder, axis=None, components=["unet"])
    adapter = AdapterFile(layers, AdapterMetadata("sd1"))
    return write_adapter(tmp_path_factory.mktemp("lora") / "a.safetensors", adapter)


def check(
    first: str, second: str, tiny_run: Callable[..., TrainConfig], tmp_path: Path, lora: Path
) -> None:
    """Train two steps at once, and one after the other, unless the settings are refused."""
    photos = Path(tiny_run().instance_data_dir)
    for photo in list(photos.glob("*.jpg")):
        photo.with_suffix(".txt").unlink()  # All have the instance prompt.
        mask = Image.linear_gradient("L").resize(Image.open(photo).size)
        mask.save(photo.with_suffix(".mask.png"))
    common: dict[str, Any] = {
        "max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-3,
        "output_dir": str(tmp_path / "whole"),
    }  # fmt: skip
    config, refusal = None, ConfigError("")
    try:
        places = {"base": Path(tiny_run().pretrained_model_name_or_path), "lora": lora}
        config = tiny_run(**common | values_of(first, second, places))
    except ConfigError as error:
        refusal = error
    if config is None:
        assert first != second, refusal
        assert refusal.setting
        assert re.search("; |, ", str(refusal))  # What is wrong, and what to do.
        return
    on = {type(one).__name__.removesuffix("Feature") for one in config.features}
    if not {first, second} <= on:  # One idles the other, and that is said.
        assert first != second, f"{WITH.get(first)} does not turn it on"
        return
    whole = train(config)
    resumed = train(
        replace(
            config,
            output_dir=str(tmp_path / "resumed"),
            class_data_dir=config.class_data_dir or str(tmp_path / "whole" / "class_images"),
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"),
        )
    )
    assert whole.result_step == resumed.result_step
    if whole.adapter is not None:
        assert_same_adapter(whole.adapter, resumed.adapter)
    else:
        files = [sorted(run.model.rglob("*.safetensors")) for run in (whole, resumed)]
        for one, other in zip(*files, strict=True):
            assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ALL)
def test_a_feature_alone_is_resumed_to_the_bit(name, tiny_run, tmp_path, lora) -> None:
    check(name, name, tiny_run, tmp_path, lora)
    values = {k: v for k, v in turned_on(name, ALL[name]).items() if v is not None}
    del values[ALL[name].on.setting]
    common = {"max_train_steps": 2, "learning_rate": 1e-3, "output_dir": str(tmp_path / "off")}
    off, files = train(tiny_run(**common | values)), []
    for folder in (off.output_dir, tmp_path / "whole"):
        adapters = [load_file(path) for path in folder.glob("*lora_weights*")]
        files.append([{key: one[key].tolist() for key in one} for one in adapters])
    # Compilation computes the same, but for rounding; samples are no part of the result.
    assert name in ("Compile", "SampleModel") or files[0] != files[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [p for p in combinations_with_replacement(ALL, 2) if p[0] != p[1]]
)
def test_two_features_are_excluded_or_resumed_to_the_bit(
    first, second, tiny_run, tmp_path, lora
) -> None:
    check(first, second, tiny_run, tmp_path, lora)
