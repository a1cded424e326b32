"""Images of the Generate tab: the displayed ones with a menu, the start image, and all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.wording import counted
from dora_diffusion.data.images import open_photo
from dora_diffusion.sampling.images import parse_parameters
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.app.views.photo import EDITOR
from dora_diffusion.studio.app.views.request import (
    acting,
    choices,
    make_request,
    prompt_notes,
)
from dora_diffusion.studio.app.views.restore import Restored, restore
from dora_diffusion.studio.jobs import uploads
from dora_diffusion.studio.jobs.deletions import image_question
from dora_diffusion.studio.jobs.image_generator import GeneratedImage
from dora_diffusion.studio.jobs.image_store import PAGE, ImageStore, keep_input, read_input
from dora_diffusion.studio.jobs.store import GONE, UserError, confined

DEVICE: dict[str, Any] = {"show": "full", "concurrency_id": "device", "concurrency_limit": 1}

_NONE = html.empty(
    "No image to start from",
    "Without one, images are made from text alone. Upload one, or take the image that is shown.",
)
MOST_PAGES = 50
GALLERY = (Path(__file__).parents[1] / "gallery.js").read_text(encoding="utf-8")
_NO_IMAGES = html.empty(
    "No images yet",
    "Choose a run and press Generate images. Side by side shows one seed without and with it.",
)


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


class StartView:
    """Fields of the image to start from.

    Attributes:
        image: Name of the stored image; empty for none.
        mask: Name of a stored mask; `studio.mask` sends the painted mask instead.
        filled: Outputs of `start_image`.
    """

    def __init__(self) -> None:
        hidden: dict[str, Any] = {"visible": False, "interactive": False}
        self.image, self.mask = gr.Textbox(**hidden), gr.Textbox(**hidden)
        options: dict[str, Any] = {"height": 150, "elem_id": "start-upload"}
        label = "Image to paint over, or into"
        self.upload = gr.File(label=label, file_types=["image"], **options)
        self.take = ui.button("Take the image that is shown", "start-take")
        self.editor = ui.html_block(_NONE, elem_id="start-image", js_on_load=EDITOR)
        self.filled = [self.image, self.mask, self.editor]


def connect_start(context: Context, tab: StartView, result: Any) -> list[Any]:
    """Connect the fields; ``result`` is the field with the name of the displayed image.

    Returns:
        The events that change the image to start from.
    """

    def upload(file: str | None) -> list[Any]:
        if not file:
            return [gr.skip()] * len(tab.filled)
        uploads.require_file(Path(file))
        return start_image(context, keep_input(context.workspace, open_photo(file)))

    def take(name: str) -> list[Any]:
        if not name:
            raise UserError("no image is shown; make one, or choose one below")
        return start_image(context, input_of(context, name))

    def drop() -> list[Any]:
        return start_image(context, "")

    return [
        ui.on(tab.upload.upload, upload, [tab.upload], tab.filled, show="minimal"),
        ui.on(tab.take.click, take, [result], tab.filled, show="minimal"),
        ui.on(tab.editor.click, drop, None, tab.filled),
    ]


def input_of(context: Context, name: object) -> str:
    """Store a generated image as an input image. Returns its name."""
    path = confined(context.workspace.images, name)
    return keep_input(context.workspace, open_photo(path))


def start_image(context: Context, image: str, mask: str = "") -> list[Any]:
    """Return the values of ``filled`` for a stored image and mask."""
    photo = read_input(context.workspace, image)
    if photo is None:
        return ["", "", _NONE]
    painted = read_input(context.workspace, mask)
    return [
        image,
        mask,
        html.template("mask.html").render(
            photo=uploads.data_uri(photo),
            version=f"start/{image}/{mask}",
            mask=uploads.mask_uri(painted.convert("L")) if painted else "",
        ),
    ]


def add_all_images(context: Context) -> Any:
    """Add the list of all images."""

    def list_page(query: Any) -> dict[str, Any]:
        return page_of(context.images, query)

    text = "Newest first, from earlier visits too. All are in runs/images."
    ui.html_block(html.heading("", "All images", text))
    return ui.html_block(
        _NO_IMAGES, elem_id="history", js_on_load=GALLERY, server_functions=[list_page]
    )


def counted_images(images: ImageStore) -> str:
    """Return the number of images. A new stamp makes the script request the list again."""
    count = len(images.entries())
    return html.pieces.count(counted(count, "image"), images.stamp) if count else _NO_IMAGES


def asked_for(query: object) -> slice:
    """Return the slice of a list that a browser requests, see `page_of`."""
    query = query if isinstance(query, dict) else {}
    numbers = (query.get("from"), query.get("count"))
    start, count = (n if type(n) is int and n > 0 else 0 for n in numbers)
    return slice(start, start + min(count or PAGE, MOST_PAGES * PAGE))


def page_of(images: ImageStore, query: object) -> dict[str, Any]:
    """Return a page of cards.

    Args:
        images: The images.
        query: The browser's request: ``from``, index of the first image; and ``count``, 0 for
            `PAGE`.

    Returns:
        ``cards`` as HTML, their ``count``, and the ``total`` of images.
    """
    entries = images.entries()
    listed = entries[asked_for(query)]
    cards = []
    for entry in listed:
        prompt = parse_parameters(images.text(entry))["Prompt"] or entry.name
        cards.append(html.image_card(images.thumbnail(entry), "show", entry.name, prompt))
    return {"cards": "".join(cards), "count": len(listed), "total": len(entries)}
