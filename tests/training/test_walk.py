"""Steps of a run: what none of them does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers.models import modeling_utils

from dora_diffusion.config import TrainConfig
from dora_diffusion.training.hook import Record
from dora_diffusion.training.recipe import train
from dora_diffusion.training.step import Step


def test_no_step_looks_at_every_module_for_the_unets_dtype(
    tiny_run: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real, step = modeling_utils.get_parameter_dtype, Step.__call__
    is_inside = [False]

    def note(module: object) -> object:
        asked.append(is_inside[0])
        return real(module)

    def noted_step(self: Step, number: int) -> Record:
        is_inside[0] = True
        record = step(self, number)
        is_inside[0] = False
        return record

    monkeypatch.setattr(modeling_utils, "get_parameter_dtype", note)
    monkeypatch.setattr(Step, "__call__", noted_step)
    train(tiny_run(max_train_steps=2))
    assert not any(asked)
