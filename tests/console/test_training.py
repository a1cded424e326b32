"""A run's events as lines and bars of a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dora_diffusion.console.training import TrainProgress
from dora_diffusion.training.events import (
    CheckpointSaved,
    ClassImagesProgress,
    Event,
    ModelLoading,
    SampleSaved,
    StepDone,
    TrainingStarted,
)


def started(**changes: Any) -> TrainingStarted:
    values: dict[str, Any] = {
        "step": 0, "total_steps": 9, "resumed_from": None, "steps_dropped": 0, "photos": 5,
        "resolution": 64, "family": "Stable Diffusion 1", "device": "cpu", "adapter": "DoRA",
        "trigger": "sks mug", "changed": {}, "unused": {},
    }  # fmt: skip
    return TrainingStarted(**values | changes)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]):
    """Shows events; gives the lines of stdout, and what the bars wrote."""

    def run(*events: Event) -> tuple[list[str], str]:
        progress = TrainProgress()
        for event in events:
            progress(event)
        progress.close()
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    return run


def test_what_is_trained_and_on_what_is_said_first(show) -> None:
    lines, bar = show(ModelLoading("org/model", "cpu", "no"), started(), StepDone(1, 9, 0.25, {}))
    assert lines == [
        "training org/model on cpu in float32",
        "Stable Diffusion 1 on cpu: 5 photos at 64 px, DoRA",
    ]
    assert "1/9" in bar
    assert "loss=0.2500" in bar


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"step": 4, "resumed_from": "checkpoint-4"}, "resuming from checkpoint-4, at step 4 of 9"),
        ({"step": 4, "resumed_from": "checkpoint-4", "steps_dropped": 2},
         "resuming from checkpoint-4, at step 4 of 9; steps 5 to 6 are repeated"),
        ({"step": 9, "resumed_from": "checkpoint-9"},
         "resuming from checkpoint-9, at step 9 of 9; nothing is left to train"),
        ({"step": 4, "changed": {"rank": (8, 16), "use_dora": (True, False)}},
         "changed from step 5 on: rank (8 -> 16), use_dora (on -> off)"),
        ({"step": 9, "unused": {"learning_rate": (1e-4, None)}},
         "without effect, since no step is left: learning_rate (0.0001 -> not set)"),
    ],
)  # fmt: skip
def test_a_resumed_run_says_where_it_is_and_what_changed(
    changes: dict[str, Any], line: str, show
) -> None:
    lines, bar = show(started(**changes))
    assert lines[1:] == [line]
    assert f"{changes['step']}/9" in bar


def test_what_is_written_is_named_and_class_images_are_counted(show) -> None:
    lines, bar = show(
        ClassImagesProgress(2, 6), ClassImagesProgress(6, 6), started(),
        SampleSaved("step-3", Path("out/step-3.png")), CheckpointSaved(3, Path("out/checkpoint-3")),
    )  # fmt: skip
    assert lines[1:] == ["sample: out/step-3.png", "checkpoint: out/checkpoint-3"]
    assert "class images" in bar
    assert "6/6" in bar


def test_a_process_that_reports_nothing_has_not_started() -> None:
    progress = TrainProgress()
    assert not progress.started
    progress.close()
