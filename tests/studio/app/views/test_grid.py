"""The Generate tab's grid: what its fields are as axes, and what a page may not ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

from dora_diffusion.cli.axes import plan_grid, read_axis
from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.studio.app.views import grid
from dora_diffusion.studio.app.views.grid import AXES, CHECKPOINT, grid_axes
from dora_diffusion.studio.jobs.store import UserError
from tests.refusal import refused

KNOWN = {setting.name: setting for setting in GenerateSettings.settings()}
PATHS = ("adapter", "base", "image", "mask_image", "model_config",
         "output", "repeat", "adapters_file")  # fmt: skip


class Run:
    """A run with two checkpoints and its result, as far as the grid asks."""

    candidates = ("checkpoint-2", "checkpoint-10", "result")

    @staticmethod
    def step_of(name: str) -> int:
        return {"checkpoint-2": 2, "checkpoint-10": 10, "result": 12}[name]


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "chosen_adapter", lambda job, name: Path("/runs, all") / name)


def axes(*values: str | None, job: Any = None) -> list[str]:
    return grid_axes(values, job, "sks mug")


def test_checkpoints_are_steps_or_all() -> None:
    for text, names in (("all", Run.candidates), ("", Run.candidates), ("10", Run.candidates[1:2])):
        (word,) = axes(CHECKPOINT, text, job=Run())
        keys = [change.key for change in read_axis(word, KNOWN).changes]
        assert keys == [repr([f"/runs, all/{n}"]) for n in names]
    with pytest.raises(UserError, match="no checkpoint of step '3'; there are 2, 10, 12"):
        axes(CHECKPOINT, "2, 3", job=Run())
    with pytest.raises(UserError, match="choose a run: the grid shows its checkpoints"):
        axes(CHECKPOINT, "all")


def test_fields_are_the_axes_of_the_command() -> None:
    words = axes("steps", "4, 8", "", "x", "prompt", "a {subject} || b, c")
    assert words == ["steps=4, 8", "prompt=a sks mug || b, c"]
    cells = plan_grid(GenerateSettings.of(base="b", prompt="p", output="o", grid=words)).cells
    assert [(cell.steps, cell.prompt) for cell in cells.values()] == [
        (steps, prompt) for steps in (4, 8) for prompt in ("a sks mug", "b, c")
    ]
    with pytest.raises(UserError, match="choose an axis"):
        axes("", "1", None, None)
    with refused("grid", "steps is 'x'"):
        axes("steps", "x")


@pytest.mark.parametrize("name", PATHS)
def test_no_axis_names_a_file_of_the_machine(name: str) -> None:
    assert name not in AXES
    with pytest.raises(UserError, match="is not an axis; choose one of the list"):
        axes(name, "/etc/passwd")
    with refused("grid", "no axes move together"):
        axes("steps", f"4 & {name}=/etc/passwd")


def test_every_axis_of_the_list_is_one_of_the_command() -> None:
    texts = {"size": "64x64", "scheduler": "euler", "clip_skip": "1"}
    for name in AXES.keys() - {"", CHECKPOINT}:
        (word,) = axes(name, texts.get(name, "1"))
        assert read_axis(word, KNOWN).changes
