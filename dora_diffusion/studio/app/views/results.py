"""The displayed images, their generation parameters, and the menu of one image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.app.views.request import (
    acting,
    choices,
    make_request,
    prompt_notes,
)
from dora_diffusion.studio.app.views.restore import Restored, restore
from dora_diffusion.studio.app.views.start import input_of, start_image
from dora_diffusion.studio.jobs.deletions import image_question
from dora_diffusion.studio.jobs.image_generator import GeneratedImage
from dora_diffusion.studio.jobs.store import GONE, UserError

DEVICE: dict[str, Any] = {"show": "full", "concurrency_id": "device", "concurrency_limit": 1}


class ResultsView:
    """Fields of the results.

    Attributes:
        shown: Name of the image that the menu applies to.
        filled: Outputs of `show_images`.
        signs: Fields that display progress.
    """

    def __init__(self) -> None:
        ui.html_block(html.heading("", "Results", "Every PNG contains its generation settings."))
        hidden: dict[str, Any] = {"visible": False, "format": "png"}
        self.slider = pair_slider("slider")
        buttons = ["download", "fullscreen"]
        self.gallery = ui.gallery(columns=2, buttons=buttons, elem_id="images", **hidden)
        self.shown, self.names = gr.Textbox(visible=False, interactive=False), gr.State([])
        with gr.Column(visible=False, elem_id="image-menu") as self.menu:
            with gr.Row():
                self.again = _button("Same again", "image-again")
                self.vary = _button("Another seed", "image-vary")
                self.start = _button("Image to image, inpainting", "image-start")
            with gr.Row():
                self.use = _button("Use its settings", "image-use")
                self.copy = _button("Copy its settings", "image-copy")
                self.delete = _button("Delete", "image-delete", variant="stop")
        self.parameters = ui.html_block(elem_id="parameters")
        self.signs = [self.slider, self.gallery, self.parameters]
        self.filled = [
            self.slider, self.gallery, self.parameters, self.shown, self.names, self.menu,
        ]  # fmt: skip


def pair_slider(name: str) -> Any:
    """Create a slider over two images, hidden while there are none."""
    options: dict[str, Any] = {"type": "filepath", "buttons": ["fullscreen"], "format": "png"}
    return gr.ImageSlider(
        show_label=False, interactive=False, visible=False, elem_id=name, **options
    )


def _button(text: str, name: str, **options: Any) -> Any:
    return ui.button(text, name, size="sm", min_width=120, **options)


def on_step(progress: Any) -> Any:
    return lambda *done: progress(done, desc="Generating images", unit="steps")


def show_images(
    images: Sequence[GeneratedImage], *, is_pair: bool = False, columns: int = 2
) -> list[Any]:
    """Return updates that display images (a pair on a slider), their parameters and the menu."""
    paths = [str(image.path) for image in images]
    listed = [] if is_pair else [(str(image.path), f"seed {image.seed}") for image in images]
    parameters, name = _one(images[-1 if is_pair else 0], is_pair=is_pair)
    return [
        gr.update(value=tuple(paths) if is_pair else None, visible=is_pair),
        gr.update(value=listed, visible=not is_pair, columns=columns),
        parameters,
        name,
        [image.path.name for image in images],
        gr.update(visible=True),
    ]


def _one(image: GeneratedImage, *, is_pair: bool = False) -> list[str]:
    """Return the settings of an image, and its name."""
    caption = "Left: the base model. Right: with the adapter, at the same seed." if is_pair else ""
    return [
        html.note(caption, "info")
        + html.notes(image.notes, "warn")
        + html.command(image.parameters, "Generation settings (also in the PNG)"),
        image.path.name,
    ]


def _restored(context: Context, name: object) -> Restored:
    """Return the settings of a generated image."""
    image = context.images.read(name)
    if not image.parameters:
        raise UserError("this image does not say how it was made")
    return restore(context, image.parameters)


def connect(context: Context, tab: ResultsView, form: Any) -> None:
    """Connect the menu; ``form`` is the tab, see `fill`."""
    _connect_remaking(context, tab, form)

    def begin(name: str) -> list[Any]:
        known = _restored(context, name)
        values = {**known.form, "image": input_of(context, name), "mask_image": ""}
        return [*fill(context, form, replace(known, form=values)), gr.update(open=True)]

    def use(name: str) -> list[Any]:
        return fill(context, form, _restored(context, name))

    def delete(name: str) -> list[Any]:
        context.images.delete(name)
        hidden = gr.update(value=None, visible=False)
        message = html.note(f"{name} deleted")
        return [hidden, hidden, message, "", [], gr.update(visible=False)]

    def choose(names: list[str], event: gr.SelectData) -> list[Any]:
        if not isinstance(event.index, int) or not 0 <= event.index < len(names):
            raise UserError("this image no longer exists; choose another one")
        return _one(context.images.read(names[event.index]))

    image = [tab.shown]
    begun = ui.on(tab.start.click, begin, image, [*form.filled, form.start_box])
    ui.on(begun.success, None, js="() => studio.reveal('start-image')")
    ui.on(tab.use.click, use, image, form.filled)
    ui.on(tab.copy.click, lambda: gr.Info("Copied"), js="() => studio.copy('#parameters pre')")
    question = functools.partial(image_question, context.images)
    ui.on(tab.delete.click, delete, image, tab.filled, confirm=question)
    ui.on(tab.gallery.select, choose, [tab.names], [tab.parameters, tab.shown])


def _connect_remaking(context: Context, tab: ResultsView, form: Any) -> None:
    """Connect the buttons that generate a variant of the displayed image."""

    def remake(change: Callable[[dict[str, Any]], Any]) -> Callable[..., list[Any]]:
        """Return a handler that generates an image with changed settings.

        It only fills in the settings if some of them cannot be restored here.
        """

        def run(name: str, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
            known = _restored(context, name)
            values = dict(known.form)
            position = change(values) or known.batch_position
            filled = fill(context, form, replace(known, form=values))
            if known.unread:
                return [*filled, *[gr.skip()] * len(tab.filled)]
            request = make_request(context, known.choice, values, position)
            images = context.generator.make(request, on_step(progress))
            return [*filled, *show_images(images)]

        return run

    def vary(values: dict[str, Any]) -> tuple[int, int]:
        values["seed"] = -1
        return 1, 0

    filled = [*form.filled, *tab.filled]
    for button, change in ((tab.again, lambda values: None), (tab.vary, vary)):
        ui.on(
            button.click, remake(change), [tab.shown], filled, show_progress_on=tab.signs, **DEVICE
        )


def fill(context: Context, form: Any, known: Restored) -> list[Any]:
    """Return updates of ``form.filled`` with an image's settings, and notes on missing ones.

    Args:
        context: The app.
        form: The tab, with its ``fields`` by name, except the fields of the image to start from.
        known: The settings.
    """
    lines = [f"Not as in the image: {line}" for line in known.unread]
    if lines:
        gr.Warning("<br>".join(map(escape, lines)), title="")
    choice: Any = known.choice or gr.skip()
    if choice == GONE:
        listed, _ = ui.choosing(choices(context, context.jobs()), GONE)
        choice = gr.update(**listed, value=GONE)
    return [
        choice,
        *(ui.holding(field, known.form[name]) for name, field in form.fields.items()),
        *start_image(context, known.form["image"], known.form["mask_image"]),
        html.notes(lines, "warn"),
        show_acting(context, known.form, known.choice),
    ]


def show_acting(context: Context, form: Mapping[str, Any], choice: str | None = None) -> str:
    """Return notes on active settings in folded sections, and on missing trigger words."""
    lines = acting(context, form)
    active = html.note(f"Also set above: {' · '.join(lines)}") if lines else ""
    return active + html.notes(prompt_notes(context, choice, form), "warn")
