"""Values that `TrainConfig` refuses, and the help of every field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dora_diffusion.config import AdapterConfig, ConfigError, TrainConfig, settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be greater than 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must not be negative"),
        ({"learning_rate": math.nan}, "learning_rate is nan; it must be a finite number"),
        ({"learning_rate": math.inf}, "learning_rate is inf; it must be a finite number"),
        ({"validation_guidance_scale": math.nan},
         "validation_guidance_scale is nan; it must be a finite number"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5; it must be at most 1"),
        ({"norm_axis": "inptu"}, "must be one of output, input (did you mean input?)"),
        ({"optimizer": "prodigy", "learning_rate": 1.0, "use_8bit_adam": True},
         "use_8bit_adam is another optimizer than prodigy; leave one of them out"),
        ({"push_to_hub": True}, "push_to_hub needs --hub_model_id NAME/MODEL"),
        ({"parametrization": "vera", "init": "pissa"},
         "parametrization vera has other numbers: leave one of them out"),
        ({"parametrization": "adalora", "init": "pissa"},
         "parametrization adalora has other numbers: leave one of them out"),
        ({"parametrization": "adalora", "rank": 4, "target_rank": 6},
         "target_rank is 6, more than the rank 4 that layers start with; raise rank"),
        ({"parametrization": "adalora", "max_train_steps": 10, "allocation_warmup": 4,
          "allocation_final": 6}, "leave none of 10 steps to allocate ranks in"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; it must be less than 1"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(**values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": {"attention": 8}}, "targets is {'attention': 8}; it must be text"),
        ({"targets": [["attention"]]}, "targets is ['attention']; it must be text"),
        ({"instance_prompt": ["a sks dog"]}, "instance_prompt is ['a sks dog']; it must be text"),
        ({"token": {"sks": 1}}, "token is {'sks': 1}; it must be text"),
        ({"token": True}, "token is True; it must be text"),
        ({"rank": True}, "rank is True; it must be a whole number"),
        ({"rank": 1.5}, "rank is 1.5; it must be a whole number"),
        ({"rank": math.inf}, "rank is inf; it must be a whole number"),
        ({"learning_rate": [1]}, "learning_rate is [1]; it must be a number"),
        ({"use_dora": "yes"}, "use_dora is 'yes'; it must be true or false"),
    ],
)
def test_what_yaml_makes_of_another_type_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict(values)
    assert str(error.value) == message


def test_values_are_read_as_diffusers_scripts_and_yaml_write_them() -> None:
    config = TrainConfig.from_dict({"optimizer": "AdamW", "mixed_precision": False, "rank": "4"})
    assert (config.optimizer, config.mixed_precision, config.rank) == ("adamw", "no", 4)


def test_every_setting_says_what_it_is() -> None:
    for setting in settings():
        assert setting.help.endswith("."), setting.name
        assert setting.group, setting.name
        # A default of None means something, which is said.
        assert setting.default is not None or setting.default_text, setting.name


def test_the_warm_up_takes_effect_with_the_constant_schedule() -> None:
    assert TrainConfig().lr_schedule == "constant"
    assert TrainConfig(lr_warmup_steps=3).lr_schedule == "constant_with_warmup"
    assert TrainConfig(lr_warmup_steps=3, lr_scheduler="cosine").lr_schedule == "cosine"


def test_a_fine_tuned_model_is_not_pushed_as_an_adapter() -> None:
    with pytest.raises(ConfigError, match="push_to_hub publishes adapters"):
        TrainConfig(method="full", push_to_hub=True, hub_model_id="me/dog")
    assert TrainConfig(use_dora=False).method_name == "lora"
    assert not TrainConfig(method="lora").unet_adapter.use_dora
    assert TrainConfig(method="full").unet_lr == 5e-6
    assert TrainConfig(method="full", learning_rate=1e-4).unet_lr == 1e-4


@pytest.mark.parametrize(
    "setting", [s for s in settings() if s.kind in (int, float)], ids=lambda s: s.name
)
def test_a_number_in_quotes_is_named(setting) -> None:
    """In Python; a file's and a command line's values are made numbers before."""
    value = ["1e-4"] if setting.is_list else "1e-4"
    value = {"to_k": "1e-4"} if setting.is_map else value
    kind = "a whole number" if setting.kind is int else "a number"
    with pytest.raises(ConfigError, match=f"{setting.name} is '1e-4'; it must be {kind}$"):
        TrainConfig(**{setting.name: value})


@pytest.mark.parametrize("name", ["rank", "alpha", "conv_rank", "conv_alpha"])
def test_a_rank_in_quotes_is_named(name) -> None:
    with pytest.raises(ConfigError, match=f"{name} is '8'; it must be a number$"):
        AdapterConfig(**{name: "8"})
