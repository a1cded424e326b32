"""The list of features: complete, whole, and none of it on a default run's path."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from dora_diffusion.config import TrainConfig, settings
from dora_diffusion.config import features as settings_of
from dora_diffusion.config.features.feature import Feature
from dora_diffusion.config.train import features_of, settings_by_name
from dora_diffusion.training import features as code_of
from dora_diffusion.training.features.code import FeatureCode
from dora_diffusion.training.hook import Hook
from dora_diffusion.training.inputs.plan import plan_run
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble
from dora_diffusion.training.results.checkpoint import state_of

ALL = features_of(TrainConfig)


def classes_in(package: Any, kind: type) -> set[type]:
    """Subclasses of a class that the modules of a package define."""
    modules = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    ]
    return {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, kind) and value is not kind
    }


def test_the_settings_have_every_feature_and_its_code_and_nothing_else() -> None:
    assert {type(one) for one in ALL} == classes_in(settings_of, Feature)
    code = {pkgutil.resolve_name(f"{code_of.__name__}.{one.code}") for one in ALL if one.code}
    assert code == classes_in(code_of, FeatureCode)


def test_what_a_feature_names_exists() -> None:
    known = settings_by_name()
    for one in ALL:
        named = {one.on.setting, *one.adds}
        named |= {row.setting for row in one.excludes if row.setting}
        assert named <= known.keys()
        assert {*one.on.values} <= {*(known[one.on.setting].choices or one.on.values)}
        assert {row.way for row in one.excludes} <= {"run", "pack", "sharding"}
    assert {setting.after for setting in settings()} - {""} <= known.keys()


def test_a_default_run_has_none() -> None:
    assert TrainConfig().features == ()


def test_no_hook_replaces_another_part_of_a_checkpoint(
    tiny_run: Callable[..., TrainConfig],
) -> None:
    """A checkpoint contains their states by name, next to the other parts of the run's state."""
    config = tiny_run()
    run = assemble(plan_run(config), make_accelerator(config))
    names = {kind.name for kind in classes_in(code_of, Hook)}
    assert names == {"", "allocation", "live"}
    assert not names & state_of(run, [], 0).keys()
