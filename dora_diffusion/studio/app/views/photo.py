"""A photo of the subject: its crop and its mask; and the view of all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.data.photos import mask_path
from dora_diffusion.models.locate import model_info
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context, plain
from dora_diffusion.studio.app.settings import EMBEDDED
from dora_diffusion.studio.app.views.captions import caption_rows
from dora_diffusion.studio.app.views.fields import BUSY, QUIET, clicked, html_block, image_or_blank
from dora_diffusion.studio.jobs.subjects import (
    StoredSubject,
    mask_labels,
    photo_path,
    photo_warnings,
    read_subject,
    remove_photo,
    training_crop,
)
from dora_diffusion.studio.jobs.uploads import (
    edit_photo,
    editor_image,
    read_mask,
    restore_original,
)
from dora_diffusion.studio.jobs.workspace import UserError

_LARGEST_SIDE = 8192
_SCRIPT = (Path(__file__).parents[1] / "editor.js").read_text(encoding="utf-8")


class PhotoView:
    """The fields of a photo."""

    def __init__(self) -> None:
        self.chosen = gr.State("")
        with gr.Group(visible=False) as self.box:
            self.title = html_block()
            with gr.Row():
                self.edit = gr.Button("Crop or mask it", size="md", elem_id="edit")
                self.drop = gr.Button("Remove photo", size="md")
            self.editor = html_block(elem_id="editor", js_on_load=_SCRIPT)


def connect(context: Context, tab: PhotoView, about: list[Any], view: list[Any]) -> None:
    """Connect the actions on the photo that was clicked.

    Args:
        context: The app.
        tab: The fields.
        about: The fields of the subject's id, the base model and the resolution.
        view: The fields that `subject_view` fills.
    """
    workspace = context.workspace
    subject, *size = about
    gallery, _, names, *_ = view

    def show(subject_id: str, chosen: Sequence[Any], message: str, kind: str) -> list[Any]:
        now = read_subject(workspace, subject_id)
        return subject_view(now, side(context, *chosen), html.note(message, kind))

    @plain
    def choose(subject_id: str, listed: list[str], event: gr.SelectData) -> list[Any]:
        if not isinstance(event.index, int) or not 0 <= event.index < len(listed):
            raise UserError("this photo no longer exists; choose another one")
        path = photo_path(workspace, subject_id, listed[event.index])
        title = f"<div class='dd-heading dd-photo'><h2>{html.esc(path.name)}</h2></div>"
        return [path.name, gr.update(visible=True), title, ""]

    @plain
    def drop(subject_id: str, photo: str, *chosen: Any) -> list[Any]:
        remove_photo(workspace, subject_id, photo)
        return show(subject_id, chosen, f"{photo} removed", "info")

    @plain
    def edit(subject_id: str, photo: str) -> str:
        return _editor(photo_path(workspace, subject_id, photo), str(subject_id))

    @plain
    def change(subject_id: str, photo: str, event: gr.EventData, *chosen: Any) -> list[Any]:
        path = photo_path(workspace, subject_id, photo)
        if clicked(event)[0] == "restore":
            restore_original(path)
            return show(subject_id, chosen, f"{photo} restored", "good")
        crop = getattr(event, "crop", None)
        mask = read_mask(getattr(event, "mask", None))
        edit_photo(path, crop if isinstance(crop, list) else None, mask)
        return show(subject_id, chosen, f"Crop and mask of {photo} saved", "good")

    about_photo, photo_fields = [subject, tab.chosen], [tab.chosen, tab.box, tab.title, tab.editor]
    gallery.select(choose, [subject, names], photo_fields, **QUIET)
    tab.drop.click(drop, [*about_photo, *size], view, **QUIET)
    tab.edit.click(edit, about_photo, [tab.editor], **QUIET)
    tab.editor.click(change, [*about_photo, *size], view, **BUSY)


def _editor(photo: Path, subject_id: str) -> str:
    """The photo to draw on, and the tools; editor.js does the drawing."""
    tools = "".join(
        f"<button class='dd-tool' data-tool='{name}'>{label}</button>"
        for name, label in (("crop", "Crop"), ("paint", "Paint the subject"), ("erase", "Erase"))
    )
    mask = mask_path(photo)
    times = [file.stat().st_mtime_ns for file in (photo, mask) if file.exists()]
    # What is drawn is kept in the browser for this photo, as it is now.
    version = html.esc("/".join(map(str, (subject_id, photo.name, *times))))
    names = ("Left", "Top", "Width", "Height")
    number = "<input type='number' min='0' max='100' step='any' data-side='{}'>"
    sides = "".join(f"<label>{name} {number.format(name.lower())}</label>" for name in names)
    return (
        "<div class='dd-editor'><p class='dd-quiet'>Drag a rectangle to crop, or write it in "
        "percent of the photo. Or paint over the "
        "subject: then only what is painted is learned.</p>"
        f"<div class='dd-tools'>{tools}<button class='dd-tool' data-do='clear'>Start over</button>"
        f"</div><canvas data-photo='{editor_image(photo)}' data-version='{version}'></canvas>"
        f"<div class='dd-tools'>{sides}</div><div class='dd-tools'>"
        "<button class='dd-button' data-do='apply'>Use this crop and mask</button>"
        "<button class='dd-tool' data-do='restore'>Back to the original</button></div></div>"
    )


def side(context: Context, model: object, resolution: object) -> int:
    """Side in pixels that a run would train at: what was typed, else the model's own."""
    text = str(resolution or "").strip()
    if text.isdecimal() and 0 < int(text) <= _LARGEST_SIDE:
        return int(text)
    try:
        return model_info(context.allowed_model(model)).resolution
    except ValueError:
        return model_info(EMBEDDED).resolution


def subject_view(subject: StoredSubject | None, side: int, message: str = "") -> list[Any]:
    """Gallery, empty state, names, report, the way on, no photo chosen, and the captions.

    Args:
        subject: Whose photos.
        side: Pixels that they would be trained at; smaller ones are warned of.
        message: What comes before the warnings.
    """
    photos = subject.photos if subject else ()
    warnings = photo_warnings(subject, side) if subject and photos else {}
    masked = mask_labels(subject, side) if subject and photos else {}
    crops = [
        image_or_blank(functools.partial(training_crop, photo), _label(photo, warnings, masked))
        for photo in photos
    ]
    lines = [line for group in warnings.values() for line in group]
    unique = list(dict.fromkeys(lines))
    return [
        gr.update(value=crops, visible=bool(crops), selected_index=None),
        gr.update(visible=not crops),
        [photo.name for photo in photos],
        message + html.notes(unique, "warn"),
        gr.update(visible=bool(crops)),
        gr.update(visible=False),
        "",
        gr.update(visible=bool(crops)),
        caption_rows(subject),
    ]


def _label(photo: Path, warnings: dict[str, list[str]], masked: dict[str, str]) -> str:
    """A photo's name in the gallery, with a mark where something is wrong with it."""
    mark = "⚠ " if photo.name in warnings else ""
    mask = f" ({masked[photo.name]})" if photo.name in masked else ""
    return f"{mark}{photo.name}{mask}"
