"""The Generate tab: images, base against adapted, and the grid of checkpoints and strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.app import html
from dora_diffusion.app.context import Context, plain
from dora_diffusion.app.studio import MAX_BATCH, Picture, Request, read_settings
from dora_diffusion.app.views.fields import QUIET, id_dropdown
from dora_diffusion.app.views.request import BASE, MERGED, OWN, field_value, make_request, numbers
from dora_diffusion.jobs.chooser import candidates
from dora_diffusion.jobs.exports import chosen_adapter
from dora_diffusion.jobs.snapshot import RESULT_NAME, Job
from dora_diffusion.jobs.workspace import AppError
from dora_diffusion.models.schedulers import SCHEDULERS

_TEMPLATES = (
    "a photo of a {subject}",
    "a photo of a {subject} on the snow",
    "a photo of a {subject} on the beach",
    "a photo of a {subject} at night",
    "a photo of two {subject}s",
)
_BUSY: dict[str, Any] = {
    "api_visibility": "private", "concurrency_id": "device", "concurrency_limit": 1,
}  # fmt: skip
_EMPTY = html.empty(
    "No images yet",
    "Choose a run and press Generate images. Compare shows one seed with and without the adapter.",
)


@dataclass(frozen=True)
class GenerateTab:
    """The tab's fields that others use too."""

    adapter: Any
    template: Any
    form: dict[str, Any]
    make: Any
    compare: Any
    grid: Any
    grid_strengths: Any
    load: Any
    blank: Any
    slider: Any
    gallery: Any
    facts: Any


def build(context: Context) -> GenerateTab:
    """Make the fields."""
    form: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            gr.HTML(
                html.heading("5", "Images", "Ask for your subject where it never was."),
                padding=False,
            )
            adapter = id_dropdown(label="Run or checkpoint", elem_id="adapter")
            template = gr.Dropdown(
                list(_TEMPLATES), value=None, label="Prompt template", elem_id="template"
            )
            form["prompt"] = gr.Textbox(
                "a photo of a {subject} on the snow",
                label="Prompt",
                info="{subject} stands for the run's trigger words.",
                lines=2,
                max_length=1000,
                elem_id="prompt",
            )
            form["negative_prompt"] = gr.Textbox(
                label="Negative prompt", max_lines=2, max_length=1000
            )
            with gr.Row():
                form["seed"] = gr.Number(
                    -1, label="Seed", info="-1 draws one.", precision=0, min_width=110,
                    elem_id="seed",
                )  # fmt: skip
                form["count"] = gr.Slider(1, MAX_BATCH, 4, step=1, label="Images", min_width=165)
            gr.HTML("<p class='dd-quiet'>How much of the adapter</p>", padding=False)
            form["strength"] = gr.Slider(
                0, 2, 1, step=0.05, label="Strength", info="0 is exactly the base model.",
                elem_id="strength",
            )  # fmt: skip
            with gr.Row():
                form["direction"] = gr.Slider(
                    0, 2, 1, step=0.05, label="Direction", info="The low-rank update.",
                    min_width=165,
                )  # fmt: skip
                form["magnitude"] = gr.Slider(
                    0, 2, 1, step=0.05, label="Magnitude", info="DoRA's learned norms.",
                    min_width=165,
                )  # fmt: skip
            with gr.Accordion("Steps, guidance, scheduler, size", open=False):
                form["steps"] = gr.Slider(1, 100, 25, step=1, label="Steps")
                form["guidance_scale"] = gr.Slider(1, 15, 3.5, step=0.1, label="Guidance")
                form["scheduler"] = gr.Dropdown([OWN, *SCHEDULERS], value=OWN, label="Scheduler")
                with gr.Row():
                    # Text: an empty number field turns into 0 when it is unfolded.
                    for side in ("width", "height"):
                        form[side] = gr.Textbox(
                            label=side.capitalize(), placeholder="the model's", max_lines=1,
                            max_length=5, min_width=110, elem_id=side,
                        )  # fmt: skip
            make = gr.Button("Generate images", variant="primary", size="lg", elem_id="make")
            compare = gr.Button("Compare with the base model", size="md", elem_id="compare")
            with gr.Accordion("Grid of checkpoints and strengths", open=False):
                strengths = gr.Textbox(
                    "0, 0.5, 1, 1.5", label="Strengths", max_lines=1, elem_id="grid-strengths"
                )
                grid = gr.Button("Make the grid", size="md", elem_id="grid")
            with gr.Accordion("Load settings from a PNG", open=False):
                load = gr.File(
                    file_types=[".png"],
                    label="An image made here, or by A1111",
                    height=120,
                    elem_id="load-png",
                )
        with gr.Column(scale=6, min_width=320):
            gr.HTML(html.heading("", "Results", "Every PNG says how it was made."), padding=False)
            blank = gr.HTML(_EMPTY, padding=False)
            slider = gr.ImageSlider(
                show_label=False,
                visible=False,
                interactive=False,
                type="filepath",
                format="png",
                buttons=["fullscreen"],
                elem_id="slider",
            )
            gallery = gr.Gallery(
                show_label=False,
                visible=False,
                columns=2,
                height="auto",
                fit_columns=False,
                object_fit="contain",
                format="png",
                buttons=["download", "fullscreen"],
                elem_id="pictures",
            )
            facts = gr.HTML("", padding=False, elem_id="parameters")
    return GenerateTab(
        adapter, template, form, make, compare, grid, strengths, load, blank, slider, gallery, facts
    )


def connect(context: Context, tab: GenerateTab) -> None:
    """Say what the fields do."""
    names, fields = list(tab.form), list(tab.form.values())
    results = [tab.blank, tab.slider, tab.gallery, tab.facts]

    def request(choice: str | None, values: Sequence[Any]) -> Request:
        return make_request(context, choice, dict(zip(names, values, strict=True)))

    @plain
    def make(choice: str | None, *values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        pictures = context.studio.make(request(choice, values), _on_step(progress))
        return _results(gallery=pictures)

    @plain
    def compare(choice: str | None, *values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        one = request(choice, values)
        if one.adapter is None:
            raise AppError("choose a run or a checkpoint to compare with its base model")
        return _results(pair=context.studio.compare(one, _on_step(progress)))

    @plain
    def grid(
        choice: str | None,
        text: str,
        *values: Any,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        one = request(choice, values)
        if one.adapter is None:
            raise AppError("choose a run: the grid shows its checkpoints")
        job = context.job(str(choice).partition("/")[0])
        adapters = {
            f"step {job.step_of(name)}": chosen_adapter(job, name) for name in candidates(job)
        }
        picture = context.studio.grid(one, adapters, numbers(text), _on_step(progress))
        return _results(gallery=[picture], columns=1)

    @plain
    def load(file: str | None) -> list[Any]:
        if not file:
            return [gr.skip()] * len(names)
        found = read_settings(Path(file))
        return [
            gr.update(value=value) if value is not None else gr.skip()
            for value in (field_value(name, found) for name in names)
        ]

    tab.make.click(make, [tab.adapter, *fields], results, **_BUSY)
    tab.compare.click(compare, [tab.adapter, *fields], results, **_BUSY)
    tab.grid.click(grid, [tab.adapter, tab.grid_strengths, *fields], results, **_BUSY)
    tab.load.upload(load, [tab.load], fields, **QUIET)
    tab.template.input(lambda text: text, [tab.template], [tab.form["prompt"]], **QUIET)


def _on_step(progress: Any) -> Any:
    def show(done: int, total: int) -> None:
        progress((done, total), desc="Generating images", unit="steps")

    return show


def _results(
    *,
    gallery: Sequence[Picture] = (),
    pair: tuple[Picture, Picture] | None = None,
    columns: int = 2,
) -> list[Any]:
    """Either images or a pair, and how they were made."""
    last = pair[1] if pair else gallery[0]
    slider = tuple(str(picture.path) for picture in pair) if pair else None
    pictures = [(str(picture.path), f"seed {picture.seed}") for picture in gallery]
    said = html.note("Left: the base model. Right: with the adapter, at the same seed.", "info")
    return [
        gr.update(visible=False),
        gr.update(value=slider, visible=bool(pair)),
        gr.update(value=pictures, visible=bool(gallery), columns=columns),
        (said if pair else "")
        + html.notes(last.unread, "warn")
        + html.command(last.parameters, "How it was made (also inside of the PNG)"),
    ]


def refresh(context: Context, jobs: Sequence[Job], chosen: str | None) -> dict[str, Any]:
    """What the clock sends to this tab."""
    choices = [
        (f"{job.title} · {job.id[9:11]}:{job.id[11:13]} · {_of(job, name)}", job.id + _slash(name))
        for job in jobs
        if job.can_generate
        for name in ("", *_others(job))
    ]
    choices += [
        (f"{job.title} (one file) · {job.id[9:11]}:{job.id[11:13]}", f"{MERGED}/{job.id}")
        for job in jobs
        if job.kind == "merge" and job.state == "done"
    ]
    choices += [(f"{name} alone", f"{BASE}/{name}") for name in context.models]
    ids = [value for _, value in choices]
    # The newest result, until somebody chooses.
    value = chosen if chosen in ids else ids[0]
    return {"adapter": ((choices, value), lambda: gr.update(choices=choices, value=value))}


def _others(job: Job) -> list[str]:
    """What a run has besides the adapter that stands for it, newest first."""
    names = [*job.checkpoints, *([RESULT_NAME] if job.state == "done" else [])]
    return [name for name in reversed(names) if name != job.stands]


def _of(job: Job, name: str) -> str:
    mark = ", chosen" if job.chosen and not name else ""
    return f"step {job.step_of(name or job.stands)}{mark}"


def _slash(name: str) -> str:
    return f"/{name}" if name else ""
