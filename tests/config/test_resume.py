"""Which settings a resumed run must have in common with its checkpoint: by their metadata."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.config import TrainConfig, differences, settings
from dora_diffusion.config.derived import resolve

OTHER: dict[str, Any] = {
    "caption_dropout": 0.3, "snr_gamma": 1.0, "noise_offset": 0.1, "lora_dropout": 0.2,
    "lr_scheduler": "linear", "lr_warmup_steps": 3, "instance_prompt": "a photo of a sks cat",
    "token": "zwx", "rank": 9, "seed": 5, "masked_loss": True,
    "cache_latents": False, "optimizer": "adafactor", "random_flip": True,
    "with_prior_preservation": True, "targets": ["attention"],
    "pretrained_model_name_or_path": "org/other", "variant": "fp16",
}  # fmt: skip
FREE: dict[str, Any] = {
    "learning_rate": 1e-3, "max_train_steps": 9, "adam_weight_decay": 0.5, "validation_steps": 2,
    "validation_prompt": ["a sks dog"], "train_batch_size": 3, "mixed_precision": "bf16",
    "max_grad_norm": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_what_changes_the_training_must_be_the_same(name: str) -> None:
    before, now = TrainConfig(), replace(TrainConfig(), **{name: OTHER[name]})
    refused, allowed = differences(before.to_dict(), now)
    assert refused == {name: (getattr(before, name), OTHER[name])}
    assert allowed == {}


@pytest.mark.parametrize("name", FREE)
def test_rates_steps_and_samples_may_change_and_are_listed(name: str) -> None:
    before, now = TrainConfig(), replace(TrainConfig(), **{name: FREE[name]})
    assert differences(before.to_dict(), now) == ({}, {name: (getattr(before, name), FREE[name])})


def test_every_setting_is_compared_unless_it_says_otherwise() -> None:
    free = {setting.name for setting in settings() if setting.resume == "free"}
    apart = {setting.name for setting in settings() if setting.resume == "apart"}
    assert apart == {
        "instance_data_dir", "class_data_dir", "dataloader_num_workers", "sample_batch_size",
            "offload",
        "output_dir", "overwrite_output_dir", "checkpointing_steps", "checkpointing_minutes",
        "checkpoints_total_limit",
        "resume_from_checkpoint", "report_to", "logging_dir", "push_to_hub", "hub_model_id",
        "single_file",
    }  # fmt: skip
    assert {"learning_rate", "max_train_steps", "validation_steps"} <= free
    assert not free & set(OTHER)


def test_a_setting_without_effect_is_not_compared() -> None:
    now = replace(TrainConfig(), keep_tags=4)
    assert differences(TrainConfig().to_dict(), now) == ({}, {})


def test_one_place_under_two_names_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    before = TrainConfig(pretrained_model_name_or_path="model").to_dict()
    now = TrainConfig(pretrained_model_name_or_path=os.fspath(tmp_path / "model"))
    assert differences(before, now) == ({}, {})


def test_a_checkpoint_without_derived_settings_is_not_refused_for_them() -> None:
    now = resolve(
        TrainConfig(instance_prompt="a sks dog"),
        resolution=64,
        total_steps=800,
        steps_per_epoch=5,
        mixed_precision="no",
    )
    refused, _ = differences(TrainConfig(instance_prompt="a sks dog").to_dict(), now)
    assert refused == {}


def test_a_setting_that_the_checkpoint_does_not_know_had_its_default() -> None:
    before = TrainConfig().to_dict()
    del before["prodigy_decouple"]
    assert differences(before, TrainConfig()) == ({}, {})


@pytest.mark.parametrize("name", ["resolution", "class_word", "lora_alpha", "conv_alpha"])
def test_derived_settings_are_compared_as_they_were_used(name: str) -> None:
    used = {"resolution": 64, "class_word": "dog", "lora_alpha": 8.0, "conv_alpha": 4.0}
    other = {"resolution": 96, "class_word": "cat", "lora_alpha": 1.0, "conv_alpha": 1.0}
    before, now = TrainConfig(**used), TrainConfig(**{**used, name: other[name]})
    assert differences(before.to_dict(), now) == ({name: (used[name], other[name])}, {})
