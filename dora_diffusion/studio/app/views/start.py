"""The input image of image-to-image, with an optional painted mask for inpainting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.data.images import open_photo
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.app.views.photo import EDITOR
from dora_diffusion.studio.jobs import uploads
from dora_diffusion.studio.jobs.inputs import keep_input, read_input
from dora_diffusion.studio.jobs.store import UserError, confined

_NONE = html.empty(
    "No image to start from",
    "Without one, images are made from text alone. Upload one, or take the image that is shown.",
)


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


def connect(context: Context, tab: StartView, result: Any) -> list[Any]:
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
