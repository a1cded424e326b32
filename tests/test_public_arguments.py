"""Every argument of every public function, and every field of a class of settings: wrong types."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dora_diffusion
from dora_diffusion import (
    AdapterConfig,
    ConfigError,
    SamplingSettings,
    TrainConfig,
    inject_adapters,
    merge_adapters,
    unmerge_adapters,
)
from dora_diffusion.config import settings
from dora_diffusion.config.arguments import _resolve
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.evaluation.report import Evaluation
from tests.every import every
from tests.refusal import check, refused
from tools.site import public_names

VALUES = {
    name: getattr(importlib.import_module(home), name) for name, home in public_names().items()
}
SETTINGS = {
    "AdapterConfig", "AdapterPool", "BaseModel", "FitSettings", "SamplingSettings", "TrainConfig",
}  # fmt: skip
"""Classes that a user makes; the others are results, or have no field."""
OTHERS = {
    "AdapterReport", "ConversionReport", "ImageRow", "ModelReport", "NormCache",
    "Setting", "VerifyReport",
}  # fmt: skip
PER_STEP = {"disabled", "norm_scope", "row_scope"}
"""Entered in every step of training or sampling: the first thing that they do checks the models."""
# Arguments that may be what their annotation's class is made from, or have none to check.
MORE: dict[str, Any] = {
    "targets": str | Sequence[str],
    "dataset_config": str | PathLike[str] | Sequence[Any],
}


class Odd:
    """A value that no argument accepts."""


def public() -> dict[str, Callable[..., Any]]:
    """Functions and classes of settings."""
    functions = {n: v for n, v in VALUES.items() if inspect.isfunction(inspect.unwrap(v))}
    return functions | {name: VALUES[name] for name in SETTINGS}


def annotations(value: Any) -> dict[str, Any]:
    """The types of parameters."""
    kinds = value.__mro__ if inspect.isclass(value) else [inspect.unwrap(value)]
    written = {name: one.annotation for name, one in inspect.signature(value).parameters.items()}
    return dict(_resolve(written, [kind.__module__ for kind in kinds])) | {
        name: hint for name, hint in MORE.items() if name in written
    }


def wrong_values(hint: Any) -> list[Any]:
    """Values of other types: of each plain one that the annotation does not have."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (
        typing.Union, type(int | str)
    ) else (hint,)  # fmt: skip
    kinds = {typing.get_origin(option) or option for option in options}
    wrong: list[Any] = [Odd()]
    wrong += [] if kinds & {int, float} else [3]
    wrong += [] if float in kinds else [2.5]
    wrong += [] if kinds & {str, Sequence, typing.Literal} and str in kinds else ["a word"]
    wrong += [] if bool in kinds else [True]
    wrong += [] if type(None) in kinds else [None]
    return [] if kinds & {Any, object} else wrong


def test_every_public_name_is_a_function_settings_or_a_result() -> None:
    errors = {n for n, v in VALUES.items() if inspect.isclass(v) and issubclass(v, Exception)}
    assert VALUES.keys() == public().keys() | OTHERS | errors | {"PRESETS"}


def test_every_argument_of_another_type_is_one_error() -> None:
    """Errors name the argument, its value and the type that it must have."""
    asked = 0
    with every() as case:
        for name, value in public().items():
            hints = annotations(value)
            hints.pop("return", None)
            for key, hint in hints.items() if name not in PER_STEP else ():
                for wrong in wrong_values(hint):
                    with case(f"{name} {key}={wrong!r}"):
                        with pytest.raises(ConfigError) as error:
                            call_with(value, key, wrong)
                        check(error.value, key, f"{key} is ", "it must be ")
                        asked += 1
    assert asked > 1000


def call_with(value: Any, key: str, wrong: Any) -> None:
    """Call with one argument alone; one by place is behind none that are wrong."""
    parameter = inspect.signature(value).parameters[key]
    if parameter.kind is parameter.VAR_POSITIONAL:
        value(wrong)
    else:
        value(**{key: wrong})


def test_every_annotation_is_read() -> None:
    """Or an argument would be unchecked without a word."""
    with every() as case:
        for name, value in public().items():
            with case(name):
                assert annotations(value).keys() == inspect.signature(value).parameters.keys()


def test_an_unknown_keyword_names_the_nearest() -> None:
    with every() as case:
        for name, value in public().items():
            names = list(inspect.signature(value).parameters)
            if name in PER_STEP or name == "compile_blocks" or not names:
                continue
            with case(name), refused(f"{names[-1]}x", f"{name} has no {names[-1]}x (did you mean "):
                value(**{f"{names[-1]}x": 1})


def test_a_setting_of_training_that_an_adapter_lacks_points_to_its_place() -> None:
    """Never to another name that is spelled alike."""
    fields = inspect.signature(AdapterConfig).parameters
    here = {"method": "use_dora=False for lora", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    lacking = [one.name for one in settings() if one.name not in fields]
    assert len(lacking) > 100
    for name in lacking:
        end = f"; here: {here[name]})" if name in here else ")"
        with pytest.raises(ConfigError) as error:
            AdapterConfig(**{name: 1})
        assert str(error.value) == f"AdapterConfig has no {name} (a setting of TrainConfig{end}"
        assert error.value.setting == name


@pytest.mark.parametrize("name", sorted(PER_STEP))
def test_scopes_name_what_is_no_model(name: str) -> None:
    more: dict[str, Any] = {"rows": [None]} if name == "row_scope" else {}
    for wrong in (Odd(), "unet", 3):
        with refused("model", "it must be a Module"), VALUES[name](wrong, **more):
            pass


def test_what_a_model_is_given_for_is_said() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with refused("rank", "is 8.0; it must be a whole number"):
        AdapterConfig(rank=8.0)  # type: ignore[arg-type]
    with refused("steps", "is '4'; it must be a whole number"):
        SamplingSettings(steps="4")  # type: ignore[arg-type]
    with refused("components", "it must be a Components"):
        dora_diffusion.generate_images(model, "a mug", [1])  # type: ignore[arg-type]
    with refused("targets", "targets[1] is 3; it must be text"):
        AdapterConfig(targets=("*", 3))  # type: ignore[arg-type]
    with refused("rank_pattern", "rank_pattern['a'] is 'b'; it must be a whole number"):
        AdapterConfig(rank_pattern={"a": "b"})  # type: ignore[dict-item]


def test_components_are_no_model_and_a_seed_is_no_list(sd1_folder: Path) -> None:
    components = dora_diffusion.load_components(sd1_folder)
    with refused(
        "model", "it must be a Module: give one of its modules, such as components.denoiser"
    ):
        dora_diffusion.inject_adapters(components, AdapterConfig())
    with refused("seeds", "is 1; it must be a list of whole numbers: write it in brackets"):
        dora_diffusion.generate_images(components, "a mug", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Evaluation])
def test_results_are_written_into_a_folder_by_its_name(kind: Any) -> None:
    assert annotations(kind.write)["folder"] == str | PathLike[str]
    with refused("folder", "is 3; it must be text or a path"):
        kind.write(object(), 3)


def test_values_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert AdapterConfig(rank=numpy.int64(4), alpha=numpy.float32(2)).rank == 4


def test_functions_keep_their_names_signatures_and_modules() -> None:
    """For help(), doctest and pickle."""
    for name, value in public().items():
        assert value.__name__ == name
        assert "args" not in inspect.signature(value).parameters
        assert isinstance(annotations(value), Mapping)


# Of fields whose every number can work.
ANY_NUMBER = {("TrainConfig", "logit_mean")}


def test_numbers_that_cannot_work_are_refused_where_they_are_given() -> None:
    """Each field of settings, with a negative and with no finite number."""
    with every() as case:
        for name in sorted(SETTINGS - {"AdapterPool"}):
            more = {"path": "model"} if name == "BaseModel" else {}
            for key, hint in annotations(VALUES[name]).items():
                kinds = {*typing.get_args(hint), hint}
                bad = [-1] if kinds & {int, float} and (name, key) not in ANY_NUMBER else []
                bad += [float("nan"), float("inf")] if float in kinds else []
                for value in bad:
                    with case(f"{name} {key}={value}"), pytest.raises(ConfigError) as error:
                        VALUES[name](**{**more, key: value})
                    check(error.value, key, f"{key} is {value}", "it must ")


def test_numbers_of_functions_are_refused_before_anything_is_done(sd1_folder: Path) -> None:
    components = dora_diffusion.load_components(sd1_folder)
    pool = dora_diffusion.AdapterPool(components)
    rows = [dora_diffusion.ImageRow("a", 1)]
    cases: dict[str, tuple[str, Callable[[], Any]]] = {
        "0 images": (
            "batch_size", lambda: dora_diffusion.generate_images(components, "a", [1], batch_size=0)
        ),
        "0 rows": ("batch_size", lambda: pool.generate(rows, batch_size=0)),
        "no rows": ("rows", lambda: pool.generate(["a"])),  # type: ignore[list-item]
        "budget": ("budget", lambda: dora_diffusion.AdapterPool(components, budget=-1)),
        "clip skip": ("clip_skip", lambda: dora_diffusion.AdapterPool(components, clip_skip=-1)),
        "retries": ("retries", lambda: dora_diffusion.run_fleet({}, "out", retries=-1)),
        "pack": ("pack", lambda: dora_diffusion.run_fleet({}, "out", pack=0)),
        "name": (
            "name",
            lambda: inject_adapters(components.denoiser, AdapterConfig(), name="a.b"),
        ),
        "quantize": ("quantize", lambda: dora_diffusion.BaseModel("x", quantize="int9")),
        "prediction": (
            "prediction_type", lambda: dora_diffusion.BaseModel("x", prediction_type="v")
        ),
    }  # fmt: skip
    with every() as case:
        for name, (setting, call) in cases.items():
            with case(name), refused(setting):
                call()


def test_numbers_of_numpy_are_pythons() -> None:
    """A sweep by NumPy makes settings that are written and trained like any other."""
    numbers = {"learning_rate": np.float64(1e-3), "rank": np.int64(4), "rslora": np.bool_(True)}
    config = TrainConfig(**numbers, lr_pattern={}, rank_pattern={"*.to_q": np.int64(2)})
    plain = TrainConfig(learning_rate=1e-3, rank=4, rslora=True, rank_pattern={"*.to_q": 2})
    assert config == plain
    assert [type(getattr(config, name)) for name in numbers] == [float, int, bool]
    assert as_yaml(config) == as_yaml(plain)


def test_a_model_without_adapters_has_nothing_to_restore() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    inject_adapters(model, AdapterConfig(targets=("*",), rank=2))
    merge_adapters(model)
    with pytest.raises(ValueError, match="keep_base=True"):
        unmerge_adapters(model)
