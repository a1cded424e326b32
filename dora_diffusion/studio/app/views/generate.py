"""The Generate tab: images, base against adapted, and the grid of checkpoints and strengths."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.run import SampleSettings
from dora_diffusion.formats.adapter.metadata import split_triggers
from dora_diffusion.formats.files.runs import RESULT_NAME
from dora_diffusion.models.schedulers import SCHEDULERS
from dora_diffusion.numerics.weights import Strengths
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.settings import PROMPT_LIMIT, default_guidance
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.jobs import image_generator
from dora_diffusion.studio.jobs.bases import path_here
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter
from dora_diffusion.studio.jobs.store import UserError, clean_text, confined
from dora_diffusion.studio.jobs.uploads import read_generation_settings

OWN = "the model's own"
BASE, MERGED = "base", "merged"
_TEMPLATES = [
    f"a photo of {what}"
    for what in (
        "a {subject}", "a {subject} in the snow", "a {subject} on the beach",
        "a {subject} at night", "two {subject}s",
    )
]  # fmt: skip
_DEVICE: dict[str, Any] = {"show": "full", "concurrency_id": "device", "concurrency_limit": 1}
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
        ui.html_block(html.heading("5", "Images", "Your subject in new places."))
        self.adapter = ui.id_dropdown(label="Run or checkpoint", elem_id="adapter")
        options: dict[str, Any] = {"value": None, "label": "Prompt template", "elem_id": "template"}
        self.template = gr.Dropdown(_TEMPLATES, **options)
        self.form["prompt"] = gr.Textbox(
            _TEMPLATES[1], label="Prompt", lines=2, max_length=PROMPT_LIMIT, elem_id="prompt",
            info="{subject} becomes the run's trigger words, of the first of several subjects.",
        )  # fmt: skip
        options = {"label": "Negative prompt", "max_lines": 2, "max_length": PROMPT_LIMIT}
        self.form["negative_prompt"] = gr.Textbox(**options)
        with gr.Row():
            options = {"label": "Seed", "info": "-1 is random.", "elem_id": "seed"}
            self.form["seed"] = gr.Number(-1, precision=0, min_width=110, **options)
            self._add_slider("count", 1, image_generator.MAX_BATCH, 4, 1, "Images", min_width=165)

    def _add_slider(
        self, name: str, low: float, high: float, value: float, step: float,
        label: str = "", **options: Any,
    ) -> None:  # fmt: skip
        label = label or name.capitalize()
        self.form[name] = gr.Slider(low, high, value, step=step, label=label, **options)

    def _add_strengths(self) -> None:
        ui.html_block(html.quiet("Adapter strength"))
        text = "0 is exactly the base model."
        self._add_slider("strength", -3, 3, 1, 0.05, info=text, elem_id="strength")
        with gr.Row():
            text = "The low-rank update."
            self._add_slider("direction", 0, 2, 1, 0.05, info=text, min_width=165)
            text = "DoRA's learned norms."
            self._add_slider("magnitude", 0, 2, 1, 0.05, info=text, min_width=165)

    def _add_sampling(self) -> None:
        with gr.Accordion("Steps, guidance, scheduler, size", open=False):
            self._add_slider("steps", 1, 100, SampleSettings.validation_inference_steps, 1)
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
                        options: dict[str, Any] = {"max_length": 5, "min_width": 90}
                        self.form[name] = ui.line(label, name, placeholder=unset, **options)

    def _add_actions(self) -> None:
        self.turn = ui.html_block(elem_id="turn", js_on_load=ui.CLICKS)
        self.make = ui.button("Generate images", "make", variant="primary", size="lg")
        self.compare = ui.button("Side by side with the base", "side-by-side")
        with gr.Accordion("Grid of checkpoints and strengths", open=False):
            self.grid_strengths = ui.line("Strengths", "grid-strengths", "0, 0.5, 1, 1.5")
            self.grid = ui.button("Make the grid", "grid")
        with gr.Accordion("Load settings from a PNG", open=False):
            text = "An image made here, or by A1111"
            options = {"height": 120, "elem_id": "load-png"}
            self.load = gr.File(label=text, file_types=[".png"], **options)

    def _add_results(self) -> None:
        ui.html_block(html.heading("", "Results", "Every PNG contains its generation settings."))
        hidden: dict[str, Any] = {"visible": False, "format": "png"}
        self.slider = gr.ImageSlider(
            show_label=False, interactive=False, type="filepath", buttons=["fullscreen"],
            elem_id="slider", **hidden,
        )  # fmt: skip
        buttons = ["download", "fullscreen"]
        self.gallery = ui.gallery(columns=2, buttons=buttons, elem_id="images", **hidden)
        self.parameters = ui.html_block(elem_id="parameters")
        self.history = ui.html_block(_EMPTY, elem_id="history", js_on_load=ui.CLICKS)


def connect(context: Context, tab: GenerateTab) -> None:
    """Connect the fields to their actions."""
    names, fields = list(tab.form), list(tab.form.values())
    results = [tab.slider, tab.gallery, tab.parameters]

    def request(
        choice: str | None, values: Sequence[Any], without: str = ""
    ) -> image_generator.GenerationRequest:
        """The request of the fields; ``without`` says what to do where there is no adapter."""
        form = dict(zip(names, values, strict=True))
        asked = make_request(context, _given(context, choice), form)
        if without and asked.adapter is None:
            raise UserError(without)
        return asked

    def make(choice: str | None, *values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        images = context.generator.make(request(choice, values), _on_step(progress))
        return _results(images)

    def compare(choice: str | None, *values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        asked = request(
            choice, values, "choose a run or a checkpoint to compare with its base model"
        )
        return _results(context.generator.compare(asked, _on_step(progress)), is_pair=True)

    def grid(
        choice: str | None, text: str, *values: Any, progress: Any = gr.Progress()  # noqa: B008
    ) -> list[Any]:  # fmt: skip
        asked = request(choice, values, "choose a run: the grid shows its checkpoints")
        job = context.job(_given(context, choice).partition("/")[0])
        adapters = {
            f"step {job.step_of(name)}": chosen_adapter(job, name) for name in job.candidates
        }
        sheet = context.generator.grid(asked, adapters, numbers(text), _on_step(progress))
        return _results([sheet], columns=1)

    def load(file: str | None) -> list[Any]:
        if not file:
            return [gr.skip()] * len(names)
        parameters = read_generation_settings(Path(file))
        each = [(field, field_value(name, parameters)) for name, field in tab.form.items()]
        return [gr.skip() if value is None else ui.holding(field, value) for field, value in each]

    def show(event: gr.EventData) -> list[Any]:
        path = confined(context.workspace.images, ui.clicked(event)[1])
        return _results([image_generator.read_image(path, path.stat().st_mtime_ns)])

    def withdraw() -> None:
        context.generator.withdraw()

    asked = [tab.adapter, *fields]
    ui.on(tab.make.click, make, asked, results, **_DEVICE)
    ui.on(tab.compare.click, compare, asked, results, **_DEVICE)
    ui.on(tab.grid.click, grid, [tab.adapter, tab.grid_strengths, *fields], results, **_DEVICE)
    ui.on(tab.load.upload, load, [tab.load], fields)
    ui.on(tab.turn.click, withdraw)
    ui.on(tab.history.click, show, None, results)
    # Also sent when the list is left with nothing chosen.
    prompt = [tab.form["prompt"]]
    ui.on(tab.template.input, lambda text: text or gr.skip(), [tab.template], prompt)


def _on_step(progress: Any) -> Any:
    return lambda *done: progress(done, desc="Generating images", unit="steps")


def _results(
    images: Sequence[image_generator.GeneratedImage], *, is_pair: bool = False, columns: int = 2
) -> list[Any]:
    """Return images, or the two of a pair on a slider, and how they were made."""
    paths = [str(image.path) for image in images]
    listed = [] if is_pair else [(str(image.path), f"seed {image.seed}") for image in images]
    caption = "Left: the base model. Right: with the adapter, at the same seed." if is_pair else ""
    last = images[-1] if is_pair else images[0]
    return [
        gr.update(value=tuple(paths) if is_pair else None, visible=is_pair),
        gr.update(value=listed, visible=not is_pair, columns=columns),
        html.note(caption, "info")
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
        "adapter": ui.choosing(choices, value, chosen),
        "history": _history(image_generator.recent_images(context.workspace)),
        "turn": _turn(next((job for job in jobs if job.is_active), None), context),
    }


def _given(context: Context, choice: str | None) -> str:
    """A choice; the first where none was made before there was a result, or the list was filled."""
    return choice or _choices(context, context.jobs())[0][1]


def _choices(context: Context, jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Return the choices of what to make images with, and labels: the newest result first."""
    choices = []
    for job in (job for job in jobs if job.stands):
        # The selected adapter, then the others, newest first.
        names = [*job.checkpoints, *([RESULT_NAME] if job.has_result else [])]
        chosen = ", chosen" if job.chosen else ""
        choices.append((f"{job.label} · step {job.step_of(job.stands)}{chosen}", job.id))
        choices += [
            (f"{job.label} · step {job.step_of(name)}", f"{job.id}/{name}")
            for name in reversed(names)
            if name != job.stands
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


def _history(images: Sequence[image_generator.GeneratedImage]) -> str:
    """Return the images that were made before, to be shown again with their settings."""
    if not images:
        return _EMPTY
    text = "Newest first, from earlier visits too. All are in runs/images."
    cards = (
        html.picture_card(image.path, "show", image.path.name, image.parameters.partition("\n")[0])
        for image in images
    )
    return f"{html.heading('', 'History', text)}<div class='dd-samples'>{''.join(cards)}</div>"


def make_request(
    context: Context, choice: str | None, form: dict[str, Any]
) -> image_generator.GenerationRequest:
    """Return the request that the fields ask for.

    Raises:
        UserError: If the run is gone or a value is out of its limits.
    """
    from dora_diffusion.sampling.generate import SamplingSettings

    base, adapter, trigger, usual_guidance = _model(context, str(choice or BASE))
    if path_here(base) is None:
        raise UserError(
            f"{base.path} is not on this machine, and no image waits for a download: get it by "
            f"'hf download {base.path}', or by training on it"
        )
    first = next(iter(split_triggers(trigger)), "")
    prompt = clean_text(form["prompt"], PROMPT_LIMIT, "prompt").replace("{subject}", first)

    guidance = _number(form, "guidance_scale", "a number from 0 to 30", float, most=30)
    settings = SamplingSettings(
        steps=int(form["steps"] or SamplingSettings.steps),
        guidance_scale=usual_guidance if guidance is None else guidance,
        scheduler=None if form["scheduler"] == OWN else form["scheduler"],
        width=_number(form, "width", "pixels, such as 512", least=1),
        height=_number(form, "height", "pixels, such as 512", least=1),
        negative_prompt=clean_text(form["negative_prompt"], PROMPT_LIMIT, "negative prompt"),
    )
    return image_generator.GenerationRequest(
        base=base,
        adapter=adapter,
        prompt=prompt,
        settings=settings,
        seed=int(-1 if form["seed"] is None else form["seed"]),
        count=int(form["count"] or 1),
        strengths=Strengths(
            *(float(form[name]) for name in ("strength", "direction", "magnitude"))
        ),
        clip_skip=_number(form, "clip_skip", "a whole number"),
        max_token_length=_number(form, "max_token_length", "a whole number"),
    )


def _number(
    form: dict[str, Any],
    name: str,
    wanted: str,
    kind: type = int,
    least: float = 0,
    most: float = math.inf,
) -> Any:
    """The number of a field; None where it is empty."""
    text = str(form.get(name) or "").strip()
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if least <= (number := kind(text)) <= most:
            return number
    called = name.removesuffix("_scale").replace("_", " ")
    raise UserError(f"the {called} is {text!r}; write {wanted}, or leave it empty")


def _model(context: Context, choice: str) -> tuple[BaseModel, Path | None, str, float]:
    """A base model alone, a merged model, or a run with the name of its checkpoint.

    Returns:
        The base, the adapter, the trigger words, and the usual guidance scale.
    """
    kind, _, name = choice.partition("/")
    if kind == BASE:
        base = BaseModel(context.allowed_model(name))
        return base, None, "mug", default_guidance(name)
    if kind == MERGED:
        job = context.job(name)
        if job.kind != "export" or job.state != "done":
            raise UserError("this merged model no longer exists; choose another one")
        # A file's configuration is its base's, or what its base was loaded with.
        own = context.job(job.record.run).settings.get("model_config")
        config = own or (None if job.base.endswith(".safetensors") else job.base)
        base = BaseModel(job.record.output, model_config=config)
        return base, None, job.trigger, default_guidance(job.base)
    job = context.job(kind)
    base = replace(job.base_model, path=context.allowed_model(job.base))
    guidance = float(job.settings.get("validation_guidance_scale") or default_guidance(job.base))
    return base, chosen_adapter(job, name), job.trigger, guidance


def field_value(name: str, parameters: dict[str, str]) -> Any:
    """A field's value from a PNG's parameters; None leaves it as it is."""
    width, _, height = parameters.get("Size", "").partition("x")
    # Of an adapter's image, what is not written was 1.
    whole = "1" if "Adapter" in parameters else None
    text = {
        "prompt": parameters.get("Prompt"),
        "negative_prompt": parameters.get("Negative prompt", ""),
        "seed": parameters.get("Seed"),
        "steps": parameters.get("Steps"),
        "guidance_scale": parameters.get("CFG scale"),
        "strength": parameters.get("Adapter strength"),
        "direction": parameters.get("Direction strength", whole),
        "magnitude": parameters.get("Magnitude strength", whole),
        "width": width or None,
        "height": height or None,
        # What the file says is the web UIs' counting, and the run's own for an image of its.
        "max_token_length": "",
        "clip_skip": "",
        "count": "1",
    }.get(name)
    if name == "scheduler":
        scheduler = parameters.get("Sampler", OWN)
        return scheduler if scheduler in SCHEDULERS else OWN
    if not text or name in ("prompt", "negative_prompt"):
        return text
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def numbers(text: str) -> list[float]:
    """Numbers that commas or spaces part.

    Raises:
        UserError: If something else is among them.
    """
    try:
        return [float(part) for part in str(text).replace(",", " ").split()]
    except ValueError:
        raise UserError(f"the strengths are {text!r}; write numbers such as 0, 0.5, 1") from None
