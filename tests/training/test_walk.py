"""Steps of a run: what none of them does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers.models import modeling_utils

from dora_diffusion.config import TrainConfig
from dora_diffusion.training.engine.step import Outcome, TrainingEngine
from dora_diffusion.training.loop import train


def test_no_step_looks_at_every_module_for_the_unets_dtype(
    tiny_run: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real, step = modeling_utils.get_parameter_dtype, TrainingEngine.__call__
    is_inside = [False]

    def note(module: object) -> object:
        asked.append(is_inside[0])
        return real(module)

    def noted_step(self: TrainingEngine, numbers: list[int]) -> list[Outcome]:
        is_inside[0] = True
        records = step(self, numbers)
        is_inside[0] = False
        return records

    monkeypatch.setattr(modeling_utils, "get_parameter_dtype", note)
    monkeypatch.setattr(TrainingEngine, "__call__", noted_step)
    train(tiny_run(max_train_steps=2))
    assert not any(asked)
