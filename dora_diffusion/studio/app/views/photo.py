"""Crop and mask of a photo, and the display of a subject's photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import mask_path
from dora_diffusion.models.locate import model_info
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.settings import EMBEDDED
from dora_diffusion.studio.app.views import captions, ui
from dora_diffusion.studio.jobs import subjects, uploads
from dora_diffusion.studio.jobs.deletions import photo_question
from dora_diffusion.studio.jobs.store import UserError

_LARGEST_SIDE = 8192
EDITOR = (Path(__file__).parents[1] / "editor.js").read_text(encoding="utf-8")


class PhotoView:
    """Fields of a photo."""

    def __init__(self) -> None:
        self.chosen = gr.State("")
        with gr.Group(visible=False) as self.box:
            self.title = ui.html_block()
            with gr.Row():
                self.edit = ui.button("Crop or mask it", "edit")
                self.drop = ui.button("Remove photo")
            self.editor = ui.html_block(elem_id="editor", js_on_load=EDITOR)


def connect(context: Context, tab: PhotoView, about: list[Any], view: list[Any]) -> None:
    """Connect the actions on the clicked photo.

    Args:
        context: The app.
        tab: The fields.
        about: Fields of the subject's id, and of `Preview`.
        view: Outputs of `subject_view`.
    """
    workspace = context.workspace
    subject, *of_preview = about
    gallery, _, names, *_ = view

    def show(subject_id: str, form: Sequence[Any], message: str, kind: str) -> list[Any]:
        now = subjects.read_subject(workspace, subject_id)
        return subject_view(now, preview(context, *form), html.note(message, kind))

    def choose(subject_id: str, listed: list[str], event: gr.SelectData) -> list[Any]:
        if not isinstance(event.index, int) or not 0 <= event.index < len(listed):
            raise UserError("this photo no longer exists; choose another one")
        path = subjects.photo_path(workspace, subject_id, listed[event.index])
        return [path.name, gr.update(visible=True), html.pieces.photo_title(path.name), ""]

    def drop(subject_id: str, photo: str, *form: Any) -> list[Any]:
        subjects.remove_photo(workspace, subject_id, photo)
        return show(subject_id, form, f"{photo} removed", "info")

    def edit(subject_id: str, photo: str) -> str:
        return _editor(subjects.photo_path(workspace, subject_id, photo), str(subject_id))

    def change(subject_id: str, photo: str, event: gr.EventData, *form: Any) -> list[Any]:
        path = subjects.photo_path(workspace, subject_id, photo)
        if ui.clicked(event)[0] == "restore":
            uploads.restore_original(path)
            return show(subject_id, form, f"{photo} restored", "good")
        crop = getattr(event, "crop", None)
        mask = uploads.read_mask(getattr(event, "mask", None))
        uploads.edit_photo(path, crop if isinstance(crop, list) else None, mask)
        return show(subject_id, form, f"Crop and mask of {photo} saved", "good")

    about_photo, photo_fields = [subject, tab.chosen], [tab.chosen, tab.box, tab.title, tab.editor]
    ui.on(gallery.select, choose, [subject, names], photo_fields)
    ui.on(
        tab.drop.click, drop, [*about_photo, *of_preview], view,
        confirm=lambda subject_id, photo, *_: photo_question(workspace, subject_id, photo),
    )  # fmt: skip
    ui.on(tab.edit.click, edit, about_photo, [tab.editor])
    ui.on(tab.editor.click, change, [*about_photo, *of_preview], view, show="minimal")


def _editor(photo: Path, subject_id: str) -> str:
    """Return the editor of a photo, with its tools; the script is editor.js."""
    times = [file.stat().st_mtime_ns for file in (photo, mask_path(photo)) if file.exists()]
    # The browser keeps a drawing for this version of the photo.
    version = "/".join(map(str, (subject_id, photo.name, *times)))
    tools = html.template("editor.html")
    return tools.render(photo=uploads.data_uri(open_photo(photo)), version=version)


class Preview(NamedTuple):
    """Settings of the Train tab that matter for the photos' warnings.

    Attributes:
        side: Training resolution in pixels: the typed one, else the model's default.
        masked_loss: Whether the run is asked to mask the loss.
    """

    side: int
    masked_loss: bool


def preview(
    context: Context, model: object, resolution: object, masked_loss: object = False
) -> Preview:
    """Return the settings in the fields of the Train tab."""
    text = str(resolution or "").strip()
    if text.isdecimal() and 0 < int(text) <= _LARGEST_SIDE:
        return Preview(int(text), bool(masked_loss))
    try:
        side = model_info(context.allowed_model(model)).resolution
    except ValueError:
        side = model_info(EMBEDDED).resolution
    return Preview(side, bool(masked_loss))


def subject_view(
    subject: subjects.StoredSubject | None, preview: Preview, message: str = ""
) -> list[Any]:
    """Return updates of gallery, empty state, names, report, next button, photo and captions.

    Args:
        subject: The subject; None for no photos.
        preview: Settings that matter for warnings.
        message: HTML before the warnings.
    """
    photos = subject.photos if subject else ()
    warnings = subjects.photo_warnings(subject, *preview) if subject and photos else {}
    masked = subjects.mask_labels(subject, *preview) if subject and photos else {}
    crops = []
    for photo in photos:
        label = f"{'⚠ ' if photo.name in warnings else ''}{photo.name}"
        label += f" ({masked[photo.name]})" if photo.name in masked else ""
        crops.append(ui.image_or_blank(label, subjects.training_crop, photo))
    unique = dict.fromkeys(line for group in warnings.values() for line in group)
    return [
        gr.update(value=crops, visible=bool(crops), selected_index=None),
        gr.update(visible=not crops),
        [photo.name for photo in photos],
        message + html.notes(unique, "warn"),
        gr.update(visible=bool(crops)),
        gr.update(visible=False),
        "",
        gr.update(visible=bool(crops)),
        *captions.shown(subject),
    ]
