"""The Generate tab's grid: its axes and their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from dora_diffusion.cli.axes import REPLACE, SIZE, read_axis
from dora_diffusion.cli.commands.generate import GenerateSettings
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.settings import PROMPT_LIMIT
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.app.views.request import FORM
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter
from dora_diffusion.studio.jobs.store import UserError, clean_text

CHECKPOINT = "checkpoint"
# Settings with a path are not axes, because any user of the page may type a value.
_SETTINGS = (
    "strength", "direction_strength", "magnitude_strength",
    "seed", "steps", "scheduler", "guidance_scale", "guidance_rescale", "clip_skip", "prompt",
    "negative_prompt", "denoise",
)  # fmt: skip
AXES: Mapping[str, str] = {
    "": "None", CHECKPOINT: "Checkpoint", REPLACE: "Words of the prompt", SIZE: "Size",
    "unet_strength": "Strength of the UNet", "text_encoder_strength": "Strength of text encoders",
    **{name: FORM[name].label for name in _SETTINGS},
}  # fmt: skip
_FIRST = ((CHECKPOINT, "all"), ("strength", "0, 0.5, 1, 1.5"), ("", ""))
_ABOUT = (
    "An image for each combination, at one seed. Separate values by commas, or by || if they "
    "contain commas; 0.5, 0.75, .., 1.25 is a range. Checkpoints are all, or some steps. For words "
    "of the prompt, each value replaces the first one in the prompt."
)


class GridView:
    """Fields of a grid; ``fields`` alternate between an axis and its values."""

    def __init__(self) -> None:
        self.fields: list[Any] = []
        choices = [(label, name) for name, label in AXES.items()]
        with gr.Accordion("Grid of checkpoints, strengths and other settings", open=False):
            ui.html_block(html.quiet(_ABOUT))
            for number, (axis, values) in enumerate(_FIRST, start=1):
                with gr.Row():
                    name = f"grid-axis-{number}"
                    options: dict[str, Any] = {"elem_id": name, "min_width": 130}
                    label = f"Axis {number}"
                    self.fields.append(gr.Dropdown(choices, value=axis, label=label, **options))
                    options = {"min_width": 165, "max_length": PROMPT_LIMIT}
                    name = f"grid-values-{number}"
                    self.fields.append(ui.line(f"Values {number}", name, values, **options))
            self.make = ui.button("Make the grid", "grid")
            self.files = ui.html_block(elem_id="grid-files")


def grid_axes(values: Sequence[str | None], job: Job | None, subject: str) -> list[str]:
    """Convert a grid's fields to axes of ``generate --grid``.

    Args:
        values: Values of `GridView.fields`.
        job: The run whose checkpoints may be an axis.
        subject: Replacement of ``{subject}``.

    Raises:
        UserError: If no axis is chosen, or one is not in `AXES`.
        ConfigError: If a value is invalid.
    """
    known = {setting.name: setting for setting in GenerateSettings.settings()}
    words = []
    for name, typed in zip(values[::2], values[1::2], strict=True):
        text = clean_text(typed or "", PROMPT_LIMIT, "values of an axis")
        text = text.replace("{subject}", subject)
        if not name:
            continue
        if name not in AXES:
            raise UserError(f"{name!r} is not an axis; choose one of the list")
        if name == CHECKPOINT:
            words.append(_checkpoints(text, job))
            continue
        words.append(f"{name}={text}")
        read_axis(words[-1], known)  # Raise an error about its values now.
    if not words:
        raise UserError("choose an axis: the grid has an image for each of its values")
    return words


def _checkpoints(text: str, job: Job | None) -> str:
    """Return the axis of a run's checkpoints: all, or the checkpoints of the typed steps."""
    if job is None or not job.candidates:
        raise UserError("choose a run: the grid shows its checkpoints")
    steps = {str(job.step_of(name)): name for name in job.candidates}
    selected = [*steps] if text in ("", "all") else [part.strip() for part in text.split(",")]
    missing = next((step for step in selected if step not in steps), None)
    if missing is not None:
        raise UserError(f"there is no checkpoint of step {missing!r}; there are {', '.join(steps)}")
    return "adapter=" + "".join(f"{chosen_adapter(job, steps[step])} || " for step in selected)
