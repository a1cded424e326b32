"""Settings as they were used: written out, read back, and following again what they follow."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from dora_diffusion.config import TrainConfig, without_effect
from dora_diffusion.config.derived import as_yaml, class_word_in, overridden, resolve

FACTS = {"resolution": 64, "total_steps": 12, "steps_per_epoch": 4, "mixed_precision": "no"}


def used(**values: Any) -> TrainConfig:
    return resolve(TrainConfig(instance_prompt="a photo of a sks robot toy", **values), **FACTS)


def test_derived_settings_are_written_out() -> None:
    config = used(rank=6, num_train_epochs=3, validation_epochs=2, lr_warmup_steps=2)
    assert (config.resolution, config.max_train_steps, config.num_train_epochs) == (64, 12, None)
    assert (config.lora_alpha, config.conv_alpha) == (6.0, 4.0)
    assert (config.class_word, config.validation_prompt) == (
        "robot toy",
        ["a photo of a sks robot toy"],
    )
    assert (config.validation_steps, config.validation_epochs) == (8, None)
    assert (config.lr_scheduler, config.mixed_precision) == ("constant_with_warmup", "no")
    assert config.class_data_dir is None


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ({}, "image-free"),
        ({"class_data_dir": "dogs"}, "images"),
        ({"class_prompt": "a photo of a dog"}, "images"),
        ({"prior_preservation_mode": "images"}, "images"),
        ({"prior_preservation_mode": "image-free", "class_prompt": "a dog"}, "image-free"),
    ],
)
def test_the_prior_is_held_by_images_where_diffusers_settings_name_them(
    values: dict[str, Any], mode: str
) -> None:
    config = used(with_prior_preservation=True, **values)
    assert config.prior_preservation_mode == mode
    assert (config.class_data_dir is None) == (mode == "image-free")
    # What is written says it, whatever is changed beside it.
    again = TrainConfig.from_dict(overridden(config.to_dict(), {"rank"}) | {"rank": 4})
    assert resolve(again, **FACTS).prior_preservation_mode == mode


def test_samples_and_checkpoints_come_at_once_unless_told_otherwise() -> None:
    assert (used().validation_steps, used().checkpointing_steps) == (200, 100)
    assert used(method="full").checkpointing_steps == 500
    assert used(num_validation_images=0).validation_steps is None
    none = used(validation_steps=0, checkpointing_steps=0)
    assert (none.validation_steps, none.checkpointing_steps) == (0, 0)


def test_what_was_given_stays() -> None:
    config = used(lora_alpha=1.0, class_word="dog", validation_prompt=["a dog"])
    assert (config.lora_alpha, config.class_word) == (1.0, "dog")
    assert config.validation_prompt == ["a dog"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"with_prior_preservation": True},
        {"train_text_encoder": True},
        {"direction": "vera"},
        {"direction": "adalora"},
        {"num_train_epochs": 3},
        {"num_validation_images": 0, "validation_epochs": None},
    ],
)
def test_resolved_settings_are_valid_input_that_means_the_same(values: dict[str, Any]) -> None:
    config = used(**values)
    again = TrainConfig.from_dict(yaml.safe_load(as_yaml(config)))
    assert again == config
    assert resolve(again, **FACTS) == config
    assert without_effect(again) == {}


def test_what_is_not_set_says_its_default() -> None:
    lines = as_yaml(used()).splitlines()
    assert "magnitude_lr: null  # their layer's" in lines
    assert "lora_alpha: 8.0" in lines


def test_a_derived_setting_follows_what_the_command_line_changes() -> None:
    file = used().to_dict()
    assert "lora_alpha" in overridden(file, set())
    left = overridden(file, {"rank"})
    assert TrainConfig.from_dict(left | {"rank": 16}).unet_adapter.rank_and_alpha(False) == (16, 16)
    apart = overridden(used(lora_alpha=2.0).to_dict(), {"rank"})
    assert apart["lora_alpha"] == 2.0
    left = overridden(file, {"instance_prompt"})
    again = TrainConfig.from_dict(left | {"instance_prompt": "a sks cat"})
    assert resolve(again, **FACTS).class_word == "cat"
    assert resolve(again, **FACTS).validation_prompt == ["a sks cat"]
    assert "max_train_steps" not in overridden(file, {"num_train_epochs"})


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a photo of a sks robot toy on grass", "robot toy"),
        ("a SKS dog, at night", "dog"),
        ("sks", ""),
    ],
)
def test_the_class_word_follows_the_token(prompt: str, word: str) -> None:
    assert class_word_in(prompt, "sks") == word
