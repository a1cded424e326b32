"""Values that follow from settings: defaults, no effect, usual rates, changes of a resumed run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import yaml

from dora_diffusion.config import (
    TrainConfig,
    differences,
    settings,
    unusual_rates,
    without_effect,
)
from dora_diffusion.config.derived import (
    as_yaml,
    defaults_of,
    overridden,
    removed_settings,
    resolve,
)
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.config.features.feature import Feature
from dora_diffusion.config.features.full import FullFeature
from dora_diffusion.config.features.outside import with_features
from dora_diffusion.config.fields import Need
from tests.every import every

FACTS: dict[str, Any] = {
    "prediction_type": "epsilon", "resolution": 64, "total_steps": 12, "steps_per_epoch": 4,
    "mixed_precision": "no", "family": FAMILIES["sd1"],
}  # fmt: skip


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


def test_the_validation_loss_is_taken_as_often_as_samples_are_made() -> None:
    assert used().validation_loss_steps is None
    assert used(validation_split=0.2).validation_loss_steps == 200
    none_between: dict[str, Any] = {"validation_split": 0.2, "validation_steps": 0}
    assert used(**none_between).validation_loss_steps == 200
    assert used(validation_split=0.2, validation_steps=7).validation_loss_steps == 7
    every = used(validation_split=0.2, validation_epochs=2, num_validation_images=0)
    assert every.validation_loss_steps == every.validation_steps == 8
    apart = used(validation_split=0.2, validation_epochs=2, validation_loss_steps=3)
    assert (apart.validation_loss_steps, apart.validation_steps) == (3, 8)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"with_prior_preservation": True},
        {"train_text_encoder": True},
        {"parametrization": "vera"},
        {"parametrization": "adalora"},
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


@pytest.mark.parametrize(
    ("given", "prediction_type", "gamma"),
    [
        ({}, "epsilon", 5.0),
        ({}, "v_prediction", 0.0),
        ({"snr_gamma": 3.0}, "v_prediction", 3.0),
    ],
)
def test_min_snr_follows_from_what_the_model_predicts(
    given: dict[str, Any], prediction_type: str, gamma: float
) -> None:
    config = resolve(TrainConfig(**given), **(FACTS | {"prediction_type": prediction_type}))
    assert config.snr_gamma == gamma
    # Written out in a run's file, it does not go to another model.
    assert overridden(config.to_dict(), {"rank"})["snr_gamma"] == gamma
    for changed in ("prediction_type", "pretrained_model_name_or_path", "teach"):
        assert ("snr_gamma" in overridden(config.to_dict(), {changed})) == bool(given)


def test_another_base_model_has_its_own_defaults() -> None:
    """Defaults of the former model in a run's file do not go to it; given values do."""
    flow, model = FAMILIES["z-image"], {"pretrained_model_name_or_path"}
    facts = FACTS | {"family": flow, "prediction_type": flow.prediction_type, "resolution": 768}
    file = resolve(TrainConfig(**flow.defaults), **facts).to_dict()
    kept = overridden(file, {"rank"}, flow, 768)
    names = {*flow.defaults, "resolution", "snr_gamma"}
    assert names <= kept.keys()
    assert "learning_rate" not in kept
    assert names.isdisjoint(overridden(file, model, flow, 768))
    given = file | dict.fromkeys(flow.defaults, 7) | {"resolution": 512, "learning_rate": 3e-4}
    assert names - {"snr_gamma"} | {"learning_rate"} <= overridden(given, model, flow, 768).keys()


def test_of_two_features_the_first_decides_a_default() -> None:
    class Second(FullFeature):
        on = Need("full_weights", ("targets",))

        def defaults(self, config: Any) -> Mapping[str, Any]:
            return {"learning_rate": 1e-3, "rank": 3}

    @dataclass(frozen=True, kw_only=True)
    class SecondSettings:
        heading: ClassVar = "Adapter"
        belongs_to: ClassVar[Feature] = Second()

    config = with_features(SecondSettings)(method="full", full_weights="targets")
    assert len(config.features) == 2
    assert config.default("learning_rate", 0) == defaults_of(config)["learning_rate"] == 5e-6
    assert config.default("rank", 0) == defaults_of(config)["rank"] == 3


def test_a_derived_setting_follows_what_the_command_line_changes() -> None:
    file = used().to_dict()
    assert "lora_alpha" in overridden(file, set())
    left = overridden(file, {"rank"})
    adapter = TrainConfig.from_dict(left | {"rank": 16}).adapter("unet")
    assert adapter.rank_and_alpha(False) == (16, 16)
    apart = overridden(used(lora_alpha=2.0).to_dict(), {"rank"})
    assert apart["lora_alpha"] == 2.0
    left = overridden(file, {"instance_prompt"})
    again = TrainConfig.from_dict(left | {"instance_prompt": "a sks cat"})
    assert resolve(again, **FACTS).class_word == "cat"
    assert resolve(again, **FACTS).validation_prompt == ["a sks cat"]
    assert "max_train_steps" not in overridden(file, {"num_train_epochs"})


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
    ({"learning_rate": 0.0}, "learning_rate", "it is 0: nothing of the denoiser is trained"),
    ({"text_encoder_lr": 0.0, "train_text_encoder": True}, "text_encoder_lr",
     "it is 0: no text encoder is trained"),
    ({"text_encoder_lr": 1e-4, "train_text_encoder": True, "optimizer": "prodigy",
      "learning_rate": 1.0}, "text_encoder_lr", "optimizer is prodigy"),
    ({"text_encoder_targets": ["text-encoder"]}, "text_encoder_targets",
     "train_text_encoder is off"),
    ({"vera_rank": 32}, "vera_rank", "parametrization is low-rank"),
    ({"parametrization": "vera", "rank": 16}, "rank", "parametrization is vera"),
    ({"parametrization": "vera", "conv_rank": 16}, "conv_rank", "parametrization is vera"),
    ({"parametrization": "vera", "lora_alpha": 16.0}, "lora_alpha", "parametrization is vera"),
    ({"parametrization": "vera", "rslora": True}, "rslora", "parametrization is vera"),
    ({"keep_tags": 2}, "keep_tags", "shuffle_tags is off and tag_dropout is 0.0"),
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
    ({"keep_best": True}, "keep_best", "no photos are held out (validation_split is 0)"),
    ({"prodigy_beta3": 0.9}, "prodigy_beta3", "optimizer is adamw"),
    ({"model_config": "sdxl"}, "model_config", "the base model is not a single .safetensors file"),
    ({"revision": "v2"}, "revision", "the base model is on this machine, not a hub id"),
    ({"logging_dir": "tb"}, "logging_dir", "report_to is not set"),
]  # fmt: skip


def test_a_setting_without_effect_is_said_with_its_reason() -> None:
    with every() as case:
        for values, name, reason in IDLE:
            with case(values):
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
        ({"parametrization": "vera", "learning_rate": 8e-3}, []),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, []),
        ({"loraplus_ratio": 16.0}, []),
        ({"text_encoder_lr": 1.0}, []),  # without effect, which is said
        ({"learning_rate": 0.1}, ["learning_rate"]),
        ({"learning_rate": 1.0, "optimizer": "adafactor"}, ["learning_rate"]),
        ({"learning_rate": 8e-8, "optimizer": "adamw8bit"}, ["learning_rate"]),
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


OTHER: dict[str, Any] = {
    "caption_dropout": 0.3, "snr_gamma": 1.0, "noise_offset": 0.1, "lora_dropout": 0.2,
    "lr_scheduler": "linear", "lr_warmup_steps": 3, "instance_prompt": "a photo of a sks cat",
    "token": "zwx", "rank": 9, "seed": 5, "masked_loss": True,
    "cache_latents": False, "optimizer": "adafactor", "random_flip": True,
    "with_prior_preservation": True, "targets": ["attention"],
    "pretrained_model_name_or_path": "org/other", "variant": "fp16", "validation_split": 0.2,
}  # fmt: skip
FREE: dict[str, Any] = {
    "learning_rate": 1e-3, "max_train_steps": 9, "adam_weight_decay": 0.5, "validation_steps": 2,
    "validation_prompt": ["a sks dog"], "train_batch_size": 3, "mixed_precision": "bf16",
    "max_grad_norm": 0.1,
}  # fmt: skip


def test_what_changes_the_training_must_be_the_same() -> None:
    before = TrainConfig(snr_gamma=5.0)
    with every() as case:
        for name, value in OTHER.items():
            change = {name: (getattr(before, name), value)}
            with case(name):
                now = replace(before, **{name: value})
                assert differences(before.to_dict(), now) == (change, {})


def test_rates_steps_and_samples_may_change_and_are_listed() -> None:
    before = TrainConfig()
    with every() as case:
        for name, value in FREE.items():
            change = {name: (getattr(before, name), value)}
            with case(name):
                now = replace(before, **{name: value})
                assert differences(before.to_dict(), now) == ({}, change)


def test_every_setting_is_compared_unless_it_says_otherwise() -> None:
    free = {setting.name for setting in settings() if setting.resume == "free"}
    apart = {setting.name for setting in settings() if setting.resume == "ignored"}
    assert apart == {
        "dataset_config", "instance_data_dir", "class_data_dir", "dataloader_num_workers",
        "sample_batch_size", "offload", "sharding", "sample_prompts",
        "sample_at_start",
        "output_dir", "overwrite_output_dir", "checkpointing_steps", "checkpointing_minutes",
        "checkpoints_total_limit",
        "resume_from_checkpoint", "report_to", "logging_dir", "push_to_hub", "hub_model_id",
        "save_precision", "single_file", "validation_data_dir", "feature",
    }  # fmt: skip
    assert {"learning_rate", "max_train_steps", "validation_steps"} <= free
    assert not free & set(OTHER)


def test_a_checkpoint_without_derived_settings_is_not_refused_for_them() -> None:
    now = resolve(
        TrainConfig(instance_prompt="a sks dog"),
        family=FAMILIES["sd1"],
        prediction_type="epsilon",
        resolution=64,
        total_steps=800,
        steps_per_epoch=5,
        mixed_precision="no",
    )
    refused, _ = differences(TrainConfig(instance_prompt="a sks dog").to_dict(), now)
    assert refused == {}


def test_any_unknown_setting_that_was_on_is_removed() -> None:
    before = TrainConfig().to_dict()
    values = {False: [False, None, 0, 0.0, "none", "", [], {}],
              True: [True, 1, 0.5, -1, "random", ["attention"], {"to_k": 4}]}  # fmt: skip
    with every() as case:
        for is_on in values:
            for value in values[is_on]:
                with case(repr(value)):
                    removed = removed_settings({**before, "unknown_setting": value})
                    assert removed == ({"unknown_setting": value} if is_on else {})


def test_defaults_of_removed_settings_changed_nothing() -> None:
    former = {
        "gradient_batches": 4, "precondition": False, "precondition_damping": 1e-2,
        "nearest_noise": 1, "stratified_timesteps": 0,
    }  # fmt: skip
    assert removed_settings(TrainConfig().to_dict() | former) == {}
    used = {"nearest_noise": 4, "init": "lora-one", "optimizer": "muon", "precondition": True}
    assert removed_settings(TrainConfig().to_dict() | former | used) == used


def test_derived_settings_are_compared_as_they_were_used() -> None:
    used = {"resolution": 64, "class_word": "dog", "lora_alpha": 8.0, "conv_alpha": 4.0}
    other = {"resolution": 96, "class_word": "cat", "lora_alpha": 1.0, "conv_alpha": 1.0}
    for name in used:
        before, now = TrainConfig(**used), TrainConfig(**{**used, name: other[name]})
        assert differences(before.to_dict(), now) == ({name: (used[name], other[name])}, {})
