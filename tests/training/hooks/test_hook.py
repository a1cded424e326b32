"""The list of hooks: complete, and none of it on a default run's path."""

from __future__ import annotations

import importlib
import pkgutil

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.learning import HOOKS
from dora_diffusion.training import hooks
from dora_diffusion.training.hooks.hook import Hook

PACKAGE = hooks.__name__


def test_the_list_names_every_hook_and_nothing_else() -> None:
    listed = {pkgutil.resolve_name(f"{PACKAGE}.{name}") for name in HOOKS}
    defined = {
        value
        for module in pkgutil.iter_modules(hooks.__path__)
        for value in vars(importlib.import_module(f"{PACKAGE}.{module.name}")).values()
        if isinstance(value, type) and issubclass(value, Hook)
    }
    # A base of others is no feature by itself.
    bases = {base for kind in defined for base in kind.__bases__}
    assert listed == defined - bases


def test_a_default_run_has_none() -> None:
    assert [name for name, is_on in HOOKS.items() if is_on(TrainConfig())] == []
