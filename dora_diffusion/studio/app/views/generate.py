"""The Generate tab: images, comparisons with the base model, and grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.fields import ConfigError
from dora_diffusion.config.schedulers import SCHEDULERS
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.settings import PROMPT_LIMIT
from dora_diffusion.studio.app.views import grid, results, ui
from dora_diffusion.studio.app.views.request import (
    BASE,
    FORM,
    MERGED,
    MORE,
    OWN,
    UNSET,
    Chosen,
    adapter_choices,
    choices,
    in_words,
    make_request,
)
from dora_diffusion.studio.app.views.restore import restore
from dora_diffusion.studio.app.views.results import DEVICE, on_step, show_acting, show_images
from dora_diffusion.studio.jobs import image_generator
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.store import UserError
from dora_diffusion.studio.jobs.uploads import read_generation_settings

_PROMPT = "a photo of a {subject} in the snow"


class GenerateTab:
    """Fields of the tab.

    Attributes:
        fields: Fields of a request by name, except the run and the image to start from.
        more: The fields of further adapters.
        acting: Notes on active settings in folded sections.
        filled: Outputs of `results.fill`.
    """

    def __init__(self, context: Context) -> None:
        self.fields: dict[str, Any] = {}
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._add_prompt()
                self._add_strengths()
                with gr.Accordion("Start from an image", open=False) as self.start_box:
                    self.start = results.StartView()
                    text = "How much of the image, or of its masked region, is painted over."
                    self._add_slider("denoise", 0.05, 1, 0.05, info=text)
                self._add_sampling()
                self._add_actions()
            with gr.Column(scale=6, min_width=320):
                self.results = results.ResultsView()
                self.history = results.add_all_images(context)
        self.filled = [self.adapter, *self.fields.values(), *self.start.filled, self.said,
                       self.acting]  # fmt: skip

    def _add_prompt(self) -> None:
        ui.html_block(html.heading("5", "Images", "Your subject in new places."))
        self.adapter = ui.id_dropdown(label="Run or checkpoint", elem_id="adapter")
        self.fields["prompt"] = gr.Textbox(
            _PROMPT, label="Prompt", lines=2, max_length=PROMPT_LIMIT, elem_id="prompt",
            info="{subject} becomes the run's trigger words, of the first of several subjects.",
        )  # fmt: skip
        options: dict[str, Any] = {"max_lines": 2, "max_length": PROMPT_LIMIT}
        self.fields["negative_prompt"] = gr.Textbox(label=FORM["negative_prompt"].label, **options)
        with gr.Row():
            options = {"label": "Seed", "info": "-1 is random.", "elem_id": "seed"}
            self.fields["seed"] = gr.Number(-1, precision=0, min_width=110, **options)
            options = {"value": 4, "label": FORM["num_images"].label, "step": 1, "min_width": 165}
            self.fields["num_images"] = gr.Slider(1, image_generator.MAX_IMAGES, **options)

    def _add_slider(self, name: str, low: float, high: float, step: float, **options: Any) -> None:
        options = {"label": FORM[name].label, "step": step, **options}
        self.fields[name] = gr.Slider(low, high, UNSET[name], **options)

    def _add_line(self, name: str, unset: str, **options: Any) -> None:
        # Also for numbers: Gradio turns an empty number field into 0 when it is unfolded.
        options = {"max_length": 5, "min_width": 90, "placeholder": unset, **options}
        self.fields[name] = ui.line(FORM[name].label, name, **options)

    def _add_strengths(self) -> None:
        ui.html_block(html.quiet("Adapter strength"))
        text = "0 is exactly the base model."
        self._add_slider("strength", -3, 3, 0.05, info=text, elem_id="strength")
        with gr.Row():
            text = "The low-rank update."
            self._add_slider("direction_strength", 0, 2, 0.05, info=text, min_width=165)
            text = "DoRA's learned norms."
            self._add_slider("magnitude_strength", 0, 2, 0.05, info=text, min_width=165)
        with gr.Accordion("More adapters", open=False):
            text = "Several adapters act together, each at its own strength, on the same base."
            ui.html_block(html.quiet(text))
            self.more = {}
            for name, strength in MORE.items():
                with gr.Row():
                    options: dict[str, Any] = {"elem_id": name, "min_width": 165}
                    self.more[name] = ui.id_dropdown(label=FORM[name].label, **options)
                    self._add_slider(strength, -3, 3, 0.05, min_width=165)
            self.fields |= self.more

    def _add_sampling(self) -> None:
        with gr.Accordion("Steps, guidance, scheduler, size", open=False):
            options: dict[str, Any] = {"value": OWN, "label": FORM["scheduler"].label}
            titled = [(scheduler.title, name) for name, scheduler in SCHEDULERS.items()]
            self.fields["scheduler"] = gr.Dropdown([(OWN, OWN), *titled], **options)
            for row in (
                (("steps", "the model's"), ("guidance_scale", "the run's")),
                (("width", "the model's"), ("height", "the model's")),
                (("max_token_length", "the run's"), ("clip_skip", "the run's")),
            ):  # fmt: skip
                with gr.Row():
                    for name, unset in row:
                        self._add_line(name, unset)
            text = "Against overexposed images of models with zero terminal SNR; 0 disables it."
            self._add_slider("guidance_rescale", 0, 1, 0.05, info=text)

    def _add_actions(self) -> None:
        self.acting = ui.html_block(elem_id="acting")
        self.turn = ui.html_block(elem_id="turn", js_on_load=ui.CLICKS)
        self.make = ui.button("Generate images", "make", variant="primary", size="lg")
        self.compare = ui.button("Side by side with the base", "side-by-side")
        self.grid = grid.GridView()
        with gr.Accordion("Load settings from an image", open=False):
            text = "An image made here, or by A1111 or Forge"
            options = {"height": 120, "elem_id": "load-png"}
            self.load = gr.File(
                label=text, file_types=[".png", ".jpg", ".jpeg", ".webp"], **options
            )
        self.said = ui.html_block(elem_id="restored")


def connect(context: Context, tab: GenerateTab, restored: Any) -> None:
    """Connect the fields; ``restored`` is the event after the draft was restored."""
    # The mask is last, see `studio.mask`.
    names = [*tab.fields, "image", "mask_image"]
    fields = [*tab.fields.values(), tab.start.image, tab.start.mask]

    def request(choice: str | None, values: Sequence[Any]) -> image_generator.GenerationRequest:
        form = dict(zip(names, values, strict=True))
        return make_request(context, _given(context, choice), form)

    def make(choice: str | None, *values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        images = context.generator.make(request(choice, values), on_step(progress))
        return show_images(images)

    def compare(choice: str | None, *values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        pair = request(choice, values)
        if not pair.adapter:
            raise UserError("choose a run or a checkpoint to compare with its base model")
        images = context.generator.compare(pair, on_step(progress))
        return show_images(images, is_pair=True)

    def make_grid(choice: str | None, *values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        count = len(tab.grid.fields)
        model = _given(context, choice)
        common, kind = request(model, values[count:]), model.partition("/")[0]
        subject = Chosen.of(context, model).subject
        job = None if kind in (BASE, MERGED) else context.job(kind)
        try:
            axes = grid.grid_axes(values[:count], job, subject)
            sheet, page = context.generator.grid(common, axes, on_step(progress))
        except ConfigError as error:
            raise UserError(in_words(error)) from error
        link = html.download(page, "The grid as a web page, with all images")
        return [*show_images([sheet], columns=1), link]

    def withdraw() -> None:
        context.generator.withdraw()

    inputs, outputs = [tab.adapter, *fields], tab.results.filled
    # Show progress next to the button too: the results may be out of sight.
    signs = [tab.turn, *tab.results.signs]
    options: dict[str, Any] = {"js": "studio.mask", "show_progress_on": signs, **DEVICE}
    ui.on(tab.make.click, make, inputs, outputs, **options)
    ui.on(tab.compare.click, compare, inputs, outputs, **options)
    of_grid = [tab.adapter, *tab.grid.fields, *fields]
    ui.on(tab.grid.make.click, make_grid, of_grid, [*outputs, tab.grid.files], **options)
    ui.on(tab.turn.click, withdraw)
    filled = [restored, *results.connect_start(context, tab.start, tab.results.shown)]
    _connect_acting(context, tab, dict(zip(names, fields, strict=True)), filled)
    results.connect(context, tab.results, tab)
    _connect_choices(context, tab)


def _connect_acting(
    context: Context, tab: GenerateTab, form: Mapping[str, Any], filled: Sequence[Any]
) -> None:
    """Describe active settings in folded sections after a change of ``form`` or other events."""

    def describe(choice: str | None, *values: Any) -> str:
        return show_acting(context, dict(zip(form, values, strict=True)), choice)

    # A folded field is not rendered and sends no change, so events that fill it are listed too.
    changed = ui.together(
        "generate-form", [tab.fields[name] for name in tab.fields if not FORM[name].is_visible]
    )
    left = (tab.fields["prompt"].blur, tab.adapter.change)
    for event in (changed, *left, *(event.then for event in filled)):
        inputs = [tab.adapter, *form.values()]
        ui.on(event, describe, inputs, [tab.acting], trigger_mode="always_last")


def _connect_choices(context: Context, tab: GenerateTab) -> None:
    """Connect the choice of an image, or of a file of settings."""

    def load(file: str | None) -> list[Any]:
        if not file:
            return [gr.skip()] * len(tab.filled)
        known = restore(context, read_generation_settings(Path(file)))
        return results.fill(context, tab, known)

    def show(event: gr.EventData) -> list[Any]:
        return show_images([context.images.read(ui.clicked(event)[1])])

    ui.on(tab.load.upload, load, [tab.load], tab.filled)
    displayed = ui.on(tab.history.click, show, None, tab.results.filled)
    ui.on(displayed.success, None, js="() => studio.reveal('images', 'nearest')")


def refresh(
    context: Context, jobs: Sequence[Job], choice: str | None, more: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Return the timer's update of this tab; ``more`` are further choices by name."""
    listed, adapters = choices(context, jobs), [("none", ""), *adapter_choices(jobs)]
    busy = next((job for job in jobs if job.is_active), None)
    # Default: the newest result. A base model as default would stay selected after the first run.
    newest = next((value for _, value in listed if not value.startswith(f"{BASE}/")), None)
    # A run's id stands for its selected adapter, which may also have been chosen by name.
    named = [f"{job.id}/{job.stands}" for job in jobs if job.stands]
    return {
        "adapter": ui.choosing(listed, choice, newest, known=named),
        **{name: ui.choosing(adapters, more.get(name), known=named) for name in MORE},
        "history": results.counted_images(context.images),
        "turn": html.pieces.turn(context.generator.turn, busy),
    }


def _given(context: Context, choice: str | None) -> str:
    """Return the choice, or the first one if nothing is selected yet."""
    return choice or choices(context, context.jobs())[0][1]
