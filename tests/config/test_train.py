"""Values that `TrainConfig` refuses, and the help of every field."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dora_diffusion.config import AdapterConfig, ConfigError, TrainConfig, settings
from dora_diffusion.config.derived import as_yaml
from tests.every import every
from tests.refusal import refused


@pytest.mark.parametrize(
    ("setting", "values", "words"),
    [
        ("rank", {"rank": 0}, "0; it must be greater than 0"),  # ranges: test_fields.py
        ("resolution", {"resolution": 70}, "70; it must be a multiple of 8, such as 64"),
        ("push_to_hub", {"push_to_hub": True}, "needs --hub_model_id NAME/MODEL"),
        ("init", {"parametrization": "vera", "init": "pissa"}, "parametrization is vera"),
        ("init", {"parametrization": "adalora", "init": "pissa"}, "parametrization is adalora"),
        ("target_rank", {"parametrization": "adalora", "rank": 4, "target_rank": 6}, "6, more"),
        ("allocation_final", {"parametrization": "adalora", "max_train_steps": 10,
         "allocation_warmup": 4, "allocation_final": 6}, "none of 10 steps to allocate ranks in"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(setting: str, values: dict[str, Any], words: str) -> None:
    with refused(setting, words):
        TrainConfig(**values)


def test_what_yaml_makes_of_another_type_is_refused() -> None:
    values = {
        "targets is {'attention': 8}; it must be text": {"targets": {"attention": 8}},
        "targets is ['attention']; it must be text": {"targets": [["attention"]]},
        "token is {'sks': 1}; it must be text": {"token": {"sks": 1}},
        "token is True; it must be text": {"token": True},
        "rank is True; it must be a whole number": {"rank": True},
        "rank is 1.5; it must be a whole number": {"rank": 1.5},
        "rank is inf; it must be a whole number": {"rank": math.inf},
        "learning_rate is [1]; it must be a number": {"learning_rate": [1]},
        "use_dora is 'yes'; it must be true or false": {"use_dora": "yes"},
    }
    with every() as case:
        for line, given in values.items():
            with case(line):
                with refused(*given) as error:
                    TrainConfig.from_dict(given)
                assert str(error.value) == line


def test_values_are_read_as_diffusers_scripts_and_yaml_write_them() -> None:
    config = TrainConfig.from_dict({"optimizer": "AdamW", "mixed_precision": False, "rank": "4"})
    assert (config.optimizer, config.mixed_precision, config.rank) == ("adamw", "no", 4)


def test_every_setting_says_what_it_is() -> None:
    for setting in settings():
        assert setting.help.endswith("."), setting.name
        assert setting.group, setting.name
        # A default of None means something, which is said.
        assert setting.default is not None or setting.default_text, setting.name


def test_a_fine_tuned_model_is_not_pushed_as_an_adapter() -> None:
    with refused("push_to_hub", "publishes adapters"):
        TrainConfig(method="full", push_to_hub=True, hub_model_id="me/dog")
    assert TrainConfig(use_dora=False).method_name == "lora"
    assert not TrainConfig(method="lora").adapter("unet").use_dora
    assert TrainConfig(method="full").unet_lr == 5e-6
    assert TrainConfig(method="full", learning_rate=1e-4).unet_lr == 1e-4


# Setting -> a value of another type, and the type that the error names.
WRONG_TYPES: dict[str, tuple[Any, str]] = {
    "rank": (8.0, "is 8.0; it must be a whole number"),
    "conv_rank": ("8", "is '8'; it must be a whole number"),
    "rslora": (1, "is 1; it must be true or false"),
    "init": (None, "is empty; give a value, or leave it out"),
    "rank_pattern": ({"to_k": True}, "is True; it must be a whole number"),
    "alpha_pattern": ([4.0], "is [4.0]; it must be a mapping, of patterns to values"),
}


@pytest.mark.parametrize("kind", [TrainConfig, AdapterConfig])
def test_a_value_of_another_type_is_refused_in_python(kind: Any) -> None:
    alpha, dropout = ("lora_alpha", "lora_dropout") if kind is TrainConfig else ("alpha", "dropout")
    wrong = WRONG_TYPES | {
        alpha: (True, "is True; it must be a number"),
        dropout: ("0.1", "is '0.1'; it must be a number"),
        "targets": ([3], "is 3; it must be text"),
    }
    with every() as case:
        for name, (value, line) in wrong.items():
            with case(name), refused(name) as error:
                kind(**{name: value})
            assert str(error.value) == f"{name} {line}"
    with refused("validation_prompt", "is 'a dog'; it must be a list"):
        TrainConfig(validation_prompt="a dog")  # type: ignore[arg-type]


def test_an_adapter_checks_its_own_numbers() -> None:
    wrong = {"conv_rank": 0, "conv_alpha": -1, "dropout": 1.0, "projection_seed": -1}
    wrong |= {"rank_pattern": {"to_k": 0}}
    with every() as case:
        for name, value in {**wrong, "targets": ()}.items():
            with case(name), refused(name):
                AdapterConfig(**{name: value})


def test_numbers_of_numpy_become_numbers_of_python() -> None:
    numbers = {"learning_rate": np.float64(1e-3), "rank": np.int64(4), "rslora": np.bool_(True)}
    config = TrainConfig(**numbers, rank_pattern={"*.to_q": np.int64(2)})
    plain = TrainConfig(learning_rate=1e-3, rank=4, rslora=True, rank_pattern={"*.to_q": 2})
    assert config == plain
    assert [type(getattr(config, name)) for name in numbers] == [float, int, bool]
    assert as_yaml(config) == as_yaml(plain)
    assert type(AdapterConfig(rank=np.int64(4)).rank) is int


def test_all_contradictions_are_named_at_once_and_one_is_its_own_error() -> None:
    own: dict[str, Any] = {"push_to_hub": True, "optimizer": "prodigy", "learning_rate": 0.01}
    with pytest.raises(ConfigError) as info:
        TrainConfig(**own, train_text_encoder_ti=True, token="")
    parts = [part.setting for part in info.value.parts]
    assert parts == ["push_to_hub", "learning_rate", "token"]
    with pytest.raises(ConfigError, match=r"^push_to_hub needs --hub_model_id") as info:
        TrainConfig(push_to_hub=True)
    assert info.value.parts == ()
