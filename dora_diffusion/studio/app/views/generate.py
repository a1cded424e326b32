"""The Generate tab: images, base against adapted, and the grid of checkpoints and strengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.run import SampleSettings
from dora_diffusion.formats.files.runs import RESULT_NAME
from dora_diffusion.models.schedulers import SCHEDULERS
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context, plain
from dora_diffusion.studio.app.draft import holding
from dora_diffusion.studio.app.views.fields import (
    CLICKS,
    QUIET,
    choosing,
    clicked,
    gallery,
    html_block,
    id_dropdown,
)
from dora_diffusion.studio.app.views.request import (
    BASE,
    MERGED,
    OWN,
    field_value,
    make_request,
    numbers,
)
from dora_diffusion.studio.jobs.checkpoints import chosen_adapter
from dora_diffusion.studio.jobs.image_generator import (
    MAX_BATCH,
    GeneratedImage,
    GenerationRequest,
    read_image,
    recent_images,
)
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.uploads import read_generation_settings
from dora_diffusion.studio.jobs.workspace import UserError, confined

_TEMPLATES = (
    "a photo of a {subject}",
    "a photo of a {subject} in the snow",
    "a photo of a {subject} on the beach",
    "a photo of a {subject} at night",
    "a photo of two {subject}s",
)
_BUSY: dict[str, Any] = {
    "api_visibility": "private", "concurrency_id": "device", "concurrency_limit": 1,
}  # fmt: skip
_EMPTY = html.empty(
    "No images yet",
    "Choose a run and press Generate images. Side by side shows one seed without and with it.",
)


class GenerateTab:
    """The tab's fields; ``form`` holds those that a request is made of, by name."""

    def __init__(self, context: Context) -> None:
        self.form: dict[str, Any] = {}
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._add_prompt()
                self._add_strengths()
                self._add_sampling()
                self._add_actions()
            with gr.Column(scale=6, min_width=320):
                self._add_results()

    def _add_prompt(self) -> None:
        html_block(html.heading("5", "Images", "Your subject in new places."))
        self.adapter = id_dropdown(label="Run or checkpoint", elem_id="adapter")
        self.template = gr.Dropdown(
            list(_TEMPLATES), value=None, label="Prompt template", elem_id="template"
        )
        self.form["prompt"] = gr.Textbox(
            "a photo of a {subject} in the snow",
            label="Prompt",
            info="{subject} becomes the run's trigger words, of the first of several subjects.",
            lines=2,
            max_length=1000,
            elem_id="prompt",
        )
        self.form["negative_prompt"] = gr.Textbox(
            label="Negative prompt", max_lines=2, max_length=1000
        )
        with gr.Row():
            self.form["seed"] = gr.Number(
                -1, label="Seed", info="-1 is random.", precision=0, min_width=110, elem_id="seed"
            )
            self.form["count"] = gr.Slider(1, MAX_BATCH, 4, step=1, label="Images", min_width=165)

    def _add_strengths(self) -> None:
        def slider(name: str, info: str, **options: Any) -> None:
            self.form[name] = gr.Slider(
                0, 2, 1, step=0.05, label=name.capitalize(), info=info, **options
            )

        html_block(html.quiet("Adapter strength"))
        slider("strength", "0 is exactly the base model.", elem_id="strength")
        with gr.Row():
            slider("direction", "The low-rank update.", min_width=165)
            slider("magnitude", "DoRA's learned norms.", min_width=165)

    def _add_sampling(self) -> None:
        with gr.Accordion("Steps, guidance, scheduler, size", open=False):
            self.form["steps"] = gr.Slider(
                1, 100, SampleSettings.validation_inference_steps, step=1, label="Steps"
            )
            self.form["scheduler"] = gr.Dropdown([OWN, *SCHEDULERS], value=OWN, label="Scheduler")
            # Text: an empty number field turns into 0 when it is unfolded.
            for row in (
                (("guidance_scale", "Guidance (CFG)", "the run's"),
                 ("width", "Width", "the model's"), ("height", "Height", "the model's")),
                (("max_token_length", "Tokens read (75, 150, ...; 0: all)", "the run's"),
                 ("clip_skip", "Clip skip, as Diffusers counts", "the run's")),
            ):  # fmt: skip
                with gr.Row():
                    for name, label, unset in row:
                        self.form[name] = gr.Textbox(
                            label=label, placeholder=unset, max_lines=1,
                            max_length=5, min_width=90, elem_id=name,
                        )  # fmt: skip

    def _add_actions(self) -> None:
        self.turn = html_block(elem_id="turn", js_on_load=CLICKS)
        self.make = gr.Button("Generate images", variant="primary", size="lg", elem_id="make")
        self.compare = gr.Button("Side by side with the base", size="md", elem_id="side-by-side")
        with gr.Accordion("Grid of checkpoints and strengths", open=False):
            self.grid_strengths = gr.Textbox(
                "0, 0.5, 1, 1.5", label="Strengths", max_lines=1, elem_id="grid-strengths"
            )
            self.grid = gr.Button("Make the grid", size="md", elem_id="grid")
        with gr.Accordion("Load settings from a PNG", open=False):
            self.load = gr.File(
                file_types=[".png"],
                label="An image made here, or by A1111",
                height=120,
                elem_id="load-png",
            )

    def _add_results(self) -> None:
        html_block(html.heading("", "Results", "Every PNG contains its generation settings."))
        self.slider = gr.ImageSlider(
            show_label=False,
            visible=False,
            interactive=False,
            type="filepath",
            format="png",
            buttons=["fullscreen"],
            elem_id="slider",
        )
        self.gallery = gallery(
            visible=False,
            columns=2,
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="images",
        )
        self.parameters = html_block(elem_id="parameters")
        self.history = html_block(_EMPTY, elem_id="history", js_on_load=CLICKS)


def connect(context: Context, tab: GenerateTab) -> None:
    """Connect the fields to their actions."""
    names, fields = list(tab.form), list(tab.form.values())
    results = [tab.slider, tab.gallery, tab.parameters]

    def request(choice: str | None, values: Sequence[Any]) -> GenerationRequest:
        return make_request(context, _given(context, choice), dict(zip(names, values, strict=True)))

    @plain
    def make(choice: str | None, *values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        images = context.generator.make(request(choice, values), _on_step(progress))
        return _results(gallery=images)

    @plain
    def compare(choice: str | None, *values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        asked = request(choice, values)
        if asked.adapter is None:
            raise UserError("choose a run or a checkpoint to compare with its base model")
        return _results(pair=context.generator.compare(asked, _on_step(progress)))

    @plain
    def grid(
        choice: str | None,
        text: str,
        *values: Any,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        asked = request(choice, values)
        if asked.adapter is None:
            raise UserError("choose a run: the grid shows its checkpoints")
        job = context.job(_given(context, choice).partition("/")[0])
        adapters = {
            f"step {job.step_of(name)}": chosen_adapter(job, name) for name in job.candidates
        }
        sheet = context.generator.grid(asked, adapters, numbers(text), _on_step(progress))
        return _results(gallery=[sheet], columns=1)

    @plain
    def load(file: str | None) -> list[Any]:
        if not file:
            return [gr.skip()] * len(names)
        parameters = read_generation_settings(Path(file))
        each = [(field, field_value(name, parameters)) for name, field in tab.form.items()]
        return [gr.skip() if value is None else holding(field, value) for field, value in each]

    @plain
    def show(event: gr.EventData) -> list[Any]:
        path = confined(context.workspace.images, clicked(event)[1])
        return _results(gallery=[read_image(path, path.stat().st_mtime_ns)])

    def withdraw() -> None:
        context.generator.withdraw()

    tab.make.click(make, [tab.adapter, *fields], results, **_BUSY)
    tab.compare.click(compare, [tab.adapter, *fields], results, **_BUSY)
    tab.grid.click(grid, [tab.adapter, tab.grid_strengths, *fields], results, **_BUSY)
    tab.load.upload(load, [tab.load], fields, **QUIET)
    tab.turn.click(withdraw, None, None, **QUIET)
    tab.history.click(show, None, results, **QUIET)
    tab.template.input(_use_template, [tab.template], [tab.form["prompt"]], **QUIET)


def _use_template(text: str | None) -> Any:
    # Also sent when the list is left with nothing chosen.
    return text or gr.skip()


def _on_step(progress: Any) -> Any:
    def show(done: int, total: int) -> None:
        progress((done, total), desc="Generating images", unit="steps")

    return show


def _results(
    *,
    gallery: Sequence[GeneratedImage] = (),
    pair: tuple[GeneratedImage, GeneratedImage] | None = None,
    columns: int = 2,
) -> list[Any]:
    """Return either images or a pair, and how they were made."""
    last = pair[1] if pair else gallery[0]
    slider = tuple(str(image.path) for image in pair) if pair else None
    images = [(str(image.path), f"seed {image.seed}") for image in gallery]
    caption = html.note("Left: the base model. Right: with the adapter, at the same seed.", "info")
    return [
        gr.update(value=slider, visible=bool(pair)),
        gr.update(value=images, visible=bool(gallery), columns=columns),
        (caption if pair else "")
        + html.notes(last.unread, "warn")
        + html.command(last.parameters, "Generation settings (also in the PNG)"),
    ]


def refresh(context: Context, jobs: Sequence[Job], chosen: str | None) -> dict[str, Any]:
    """Return the timer's update of this tab."""
    choices = _choices(context, jobs)
    ids = [value for _, value in choices]
    # The newest result, until somebody chooses. A base model that nobody chose would stay chosen
    # when the first run ends.
    results = [value for value in ids if not value.startswith(f"{BASE}/")]
    value = chosen if chosen in ids else next(iter(results), None)
    return {
        "adapter": choosing(choices, value, chosen),
        "history": _history(recent_images(context.workspace)),
        "turn": _turn(next((job for job in jobs if job.is_active), None), context),
    }


def _given(context: Context, choice: str | None) -> str:
    """A choice; the first where none was made before there was a result, or the list was filled."""
    return choice or _choices(context, context.jobs())[0][1]


def _choices(context: Context, jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Return the choices of what to make images with, and labels: the newest result first."""
    choices = [
        (f"{job.label} · {_of(job, name)}", f"{job.id}/{name}".rstrip("/"))
        for job in jobs
        if job.can_generate
        for name in ("", *_others(job))
    ]
    choices += [
        (f"{job.label} (one file)", f"{MERGED}/{job.id}")
        for job in jobs
        if job.kind == "export" and job.state == "done"
    ]
    return choices + [(f"{name} alone", f"{BASE}/{name}") for name in context.models]


def _turn(busy: Job | None, context: Context) -> str:
    """Describe what images wait for, or would wait for."""
    if busy is None and not context.generator.is_waiting:
        return ""
    left = busy.remaining_seconds if busy else None
    end = f" (about {html.duration(left)})" if left is not None else ""
    what = f"until {busy.title} has ended{end}" if busy else "until the device is free"
    if not context.generator.is_waiting:
        return html.note(f"Images wait {what}.")
    text = f"Waiting {what}. The images are made then, and are in the history below."
    return html.note(text) + html.button("Stop waiting", "withdraw", "")


def _history(images: Sequence[GeneratedImage]) -> str:
    """Return the images that were made before, to be shown again with their settings."""
    if not images:
        return _EMPTY
    text = "Newest first, from earlier visits too. All are in runs/images."
    cards = (
        html.picture_card(image.path, "show", image.path.name, image.parameters.partition("\n")[0])
        for image in images
    )
    return f"{html.heading('', 'History', text)}<div class='dd-samples'>{''.join(cards)}</div>"


def _others(job: Job) -> list[str]:
    """Return a run's results besides the selected adapter, newest first."""
    names = [*job.checkpoints, *([RESULT_NAME] if job.has_result else [])]
    return [name for name in reversed(names) if name != job.stands]


def _of(job: Job, name: str) -> str:
    mark = ", chosen" if job.chosen and not name else ""
    return f"step {job.step_of(name or job.stands)}{mark}"
