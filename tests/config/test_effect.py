"""One check says which settings have no effect, and why; it holds against what training reads."""

from __future__ import annotations

from typing import Any

import pytest

from dora_diffusion.config import TrainConfig, settings, unusual_rates, without_effect

IDLE: list[tuple[dict[str, Any], str, str]] = [
    ({"prior_preservation_mode": "image-free"}, "prior_preservation_mode",
     "with_prior_preservation is off"),
    ({"prior_loss_weight": 0.5}, "prior_loss_weight", "with_prior_preservation is off"),
    ({"with_prior_preservation": True, "num_class_images": 7}, "num_class_images",
     "prior_preservation_mode is image-free"),
    ({"with_prior_preservation": True, "prior_preservation_mode": "image-free",
      "class_prompt": "a dog"}, "class_prompt", "prior_preservation_mode is image-free"),
    ({"checkpointing_steps": 0, "checkpointing_minutes": 3.0}, "checkpointing_minutes",
     "checkpointing_steps is 0"),
    ({"validation_steps": 0, "validation_epochs": 3}, "validation_epochs",
     "validation_steps is 0"),
    ({"text_encoder_lr": 1e-4}, "text_encoder_lr", "train_text_encoder is off"),
    ({"learning_rate": 0.0}, "learning_rate", "it is 0: nothing of the UNet is trained"),
    ({"text_encoder_lr": 0.0, "train_text_encoder": True}, "text_encoder_lr",
     "it is 0: no text encoder is trained"),
    ({"text_encoder_lr": 1e-4, "train_text_encoder": True, "optimizer": "prodigy",
      "learning_rate": 1.0}, "text_encoder_lr", "optimizer is prodigy"),
    ({"text_encoder_targets": ["text-encoder"]}, "text_encoder_targets",
     "train_text_encoder is off"),
    ({"vera_rank": 32}, "vera_rank", "direction is low-rank"),
    ({"direction": "vera", "rank": 16}, "rank", "direction is vera"),
    ({"direction": "vera", "conv_rank": 16}, "conv_rank", "direction is vera"),
    ({"direction": "vera", "lora_alpha": 16.0}, "lora_alpha", "direction is vera"),
    ({"direction": "vera", "rslora": True}, "rslora", "direction is vera"),
    ({"keep_tags": 2}, "keep_tags", "shuffle_tags is off"),
    ({"optimizer": "adafactor", "adam_beta1": 0.8}, "adam_beta1", "optimizer is adafactor"),
    ({"optimizer": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon", "optimizer is adafactor"),
    ({"use_dora": False, "norm_axis": "input"}, "norm_axis", "use_dora is off"),
    ({"use_dora": False, "magnitude_lr": 1e-3}, "magnitude_lr", "use_dora is off"),
    ({"num_train_epochs": 3, "max_train_steps": 50}, "num_train_epochs", "max_train_steps is 50"),
    ({"lr_num_cycles": 3}, "lr_num_cycles", "lr_scheduler is constant"),
    ({"lr_power": 2.0}, "lr_power", "lr_scheduler is constant"),
    ({"dataloader_num_workers": 2}, "dataloader_num_workers", "cache_latents is on"),
    ({"validation_steps": 5, "num_validation_images": 0}, "validation_steps",
     "num_validation_images is 0"),
    ({"prodigy_beta3": 0.9}, "prodigy_beta3", "optimizer is adamw"),
    ({"model_config": "sdxl"}, "model_config", "the base model is not a single .safetensors file"),
    ({"revision": "v2"}, "revision", "the base model is not from the hub"),
    ({"logging_dir": "tb"}, "logging_dir", "report_to is not set"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "name", "reason"), IDLE)
def test_a_setting_without_effect_is_said_with_its_reason(
    values: dict[str, Any], name: str, reason: str
) -> None:
    found = without_effect(TrainConfig(**values))
    assert found[name] == f"{name} has no effect because {reason}"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"shuffle_tags": True, "keep_tags": 2},
        {"with_prior_preservation": True, "num_class_images": 5, "class_prompt": "a dog"},
        {"train_text_encoder": True, "text_encoder_lr": 1e-4},
        {"optimizer": "prodigy", "learning_rate": 1.0, "adam_beta1": 0.8, "prodigy_beta3": 0.9},
        {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3, "lr_warmup_steps": 5},
        {"learning_rate": 0.0, "magnitude_lr": 1e-3},  # magnitudes alone
        {"lr_warmup_steps": 5},  # takes effect with the constant schedule
        {"num_train_epochs": 3, "validation_epochs": 1},
        {"revision": "v2", "pretrained_model_name_or_path": "org/model"},
        {"num_validation_images": 0, "validation_inference_steps": 9,
         "with_prior_preservation": True},
    ],
)  # fmt: skip
def test_settings_that_have_an_effect_are_not_named(values: dict[str, Any]) -> None:
    assert without_effect(TrainConfig(**values)) == {}


def test_what_is_given_at_its_default_is_said_too() -> None:
    config = TrainConfig()
    assert without_effect(config) == {}
    assert list(without_effect(config, {"keep_tags", "rank"})) == ["keep_tags"]


def test_needs_name_settings_that_a_resumed_run_keeps_or_that_are_free_themselves() -> None:
    """A setting without effect is not compared on resume: what makes it idle must be compared."""
    by_name = {setting.name: setting for setting in settings()}
    for setting in settings():
        if setting.resume != "same":
            continue
        for need in setting.needs:
            other = getattr(need, "setting", None)
            assert other is None or by_name[other].resume == "same", (setting.name, other)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, []),
        ({"method": "full"}, []),
        ({"learning_rate": 2e-3}, []),  # the samples'
        ({"learning_rate": 0.0}, []),
        ({"direction": "vera", "learning_rate": 8e-3}, []),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, []),
        ({"loraplus_ratio": 16.0}, []),
        ({"text_encoder_lr": 1.0}, []),  # without effect, which is said
        ({"learning_rate": 0.1}, ["learning_rate"]),
        ({"learning_rate": 1.0, "optimizer": "adafactor"}, ["learning_rate"]),
        ({"learning_rate": 8e-8, "use_8bit_adam": True}, ["learning_rate"]),
        ({"learning_rate": 1e-3, "method": "full"}, ["learning_rate"]),
        ({"learning_rate": 20.0, "optimizer": "prodigy"}, ["learning_rate"]),
        ({"text_encoder_lr": 0.1, "train_text_encoder": True}, ["text_encoder_lr"]),
        ({"magnitude_lr": 1.0}, ["magnitude_lr"]),
        ({"loraplus_ratio": 1e4}, ["learning_rate times loraplus_ratio"]),
    ],
)
def test_rates_that_nobody_takes_are_said(given, names):
    said = unusual_rates(TrainConfig(**given))
    assert [text.partition(" is ")[0] for text in said] == names
    assert all("usually takes" in text for text in said)
