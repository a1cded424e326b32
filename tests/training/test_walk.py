"""Length of a photo's walk through a run: the modules it enters, the functions it calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import pytest
from diffusers.models import modeling_utils

import dora_diffusion
from dora_diffusion.config import TrainConfig
from dora_diffusion.training.engine.step import Outcome, TrainingEngine
from dora_diffusion.training.loop import train

PACKAGE = str(Path(dora_diffusion.__file__).parent)
# Modules and functions of a run of three steps, and of its last step.
RUN, STEP = (101, 1110), (32, 240)


def walked(seen: set[CodeType]) -> tuple[int, int]:
    """Modules of the package, and their functions, each counted once."""
    ours = {(c.co_filename, c.co_qualname) for c in seen if c.co_filename.startswith(PACKAGE)}
    return len({file for file, _ in ours}), len(ours)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code has no qualified name")
def test_a_run_enters_few_modules_and_functions(
    tiny_run: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run: set[CodeType] = set()
    last: set[CodeType] = set()
    seen = run
    real = TrainingEngine.__call__

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            seen.add(frame.f_code)

    def step(self: TrainingEngine, numbers: list[int]) -> list[Outcome]:
        nonlocal seen
        if numbers[0] < 3:
            return real(self, numbers)
        seen = last
        records = real(self, numbers)
        seen = run
        run.update(last)
        return records

    monkeypatch.setattr(TrainingEngine, "__call__", step)
    config = tiny_run(max_train_steps=3, targets=["attention+conv"])
    sys.setprofile(note)
    try:
        train(config)
    finally:
        sys.setprofile(None)
    for counted, most in ((walked(run), RUN), (walked(last), STEP)):
        assert counted[0] <= most[0]
        assert counted[1] <= most[1]


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
