"""The list of hooks: complete, and none of it on a default run's path."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.learning import HOOKS
from dora_diffusion.training import hooks
from dora_diffusion.training.hooks.hook import Hook
from dora_diffusion.training.inputs.subject import subjects_of
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble
from dora_diffusion.training.results.checkpoint import state_of

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


def test_no_hook_replaces_another_part_of_a_checkpoint(
    tiny_run: Callable[..., TrainConfig],
) -> None:
    """A checkpoint contains their states by name, next to the other parts of the run's state."""
    config = tiny_run()
    run = assemble(config, subjects_of(config), make_accelerator(config))
    names = {pkgutil.resolve_name(f"{PACKAGE}.{name}").name for name in HOOKS}
    assert not names & state_of(run, [], 0).keys()
