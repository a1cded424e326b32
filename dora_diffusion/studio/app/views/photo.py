"""A photo of the subject: crop, mask and caption; and the view of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.wording import counted
from dora_diffusion.data.captions import CaptionEdit, read_caption
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import mask_path
from dora_diffusion.models.locate import model_info
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.settings import EMBEDDED
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.jobs import subjects, uploads
from dora_diffusion.studio.jobs.store import UserError

_LARGEST_SIDE, _ROW_SIDE = 8192, 96
_EDITOR, _TOOLS, _CAPTIONS = (
    (Path(__file__).parents[1] / name).read_text(encoding="utf-8")
    for name in ("editor.js", "editor.html", "captions.js")
)


class PhotoView:
    """The fields of a photo."""

    def __init__(self) -> None:
        self.chosen = gr.State("")
        with gr.Group(visible=False) as self.box:
            self.title = ui.html_block()
            with gr.Row():
                self.edit = ui.button("Crop or mask it", "edit")
                self.drop = ui.button("Remove photo")
            self.editor = ui.html_block(elem_id="editor", js_on_load=_EDITOR)


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
        now = subjects.read_subject(workspace, subject_id)
        return subject_view(now, side(context, *chosen), html.note(message, kind))

    def choose(subject_id: str, listed: list[str], event: gr.SelectData) -> list[Any]:
        if not isinstance(event.index, int) or not 0 <= event.index < len(listed):
            raise UserError("this photo no longer exists; choose another one")
        path = subjects.photo_path(workspace, subject_id, listed[event.index])
        title = f"<div class='dd-heading dd-photo'><h2>{html.esc(path.name)}</h2></div>"
        return [path.name, gr.update(visible=True), title, ""]

    def drop(subject_id: str, photo: str, *chosen: Any) -> list[Any]:
        subjects.remove_photo(workspace, subject_id, photo)
        return show(subject_id, chosen, f"{photo} removed", "info")

    def edit(subject_id: str, photo: str) -> str:
        return _editor(subjects.photo_path(workspace, subject_id, photo), str(subject_id))

    def change(subject_id: str, photo: str, event: gr.EventData, *chosen: Any) -> list[Any]:
        path = subjects.photo_path(workspace, subject_id, photo)
        if ui.clicked(event)[0] == "restore":
            uploads.restore_original(path)
            return show(subject_id, chosen, f"{photo} restored", "good")
        crop = getattr(event, "crop", None)
        mask = uploads.read_mask(getattr(event, "mask", None))
        uploads.edit_photo(path, crop if isinstance(crop, list) else None, mask)
        return show(subject_id, chosen, f"Crop and mask of {photo} saved", "good")

    about_photo, photo_fields = [subject, tab.chosen], [tab.chosen, tab.box, tab.title, tab.editor]
    ui.on(gallery.select, choose, [subject, names], photo_fields)
    ui.on(tab.drop.click, drop, [*about_photo, *size], view)
    ui.on(tab.edit.click, edit, about_photo, [tab.editor])
    ui.on(tab.editor.click, change, [*about_photo, *size], view, show="minimal")


def _editor(photo: Path, subject_id: str) -> str:
    """The photo to draw on, and the tools; editor.js does the drawing."""
    times = [file.stat().st_mtime_ns for file in (photo, mask_path(photo)) if file.exists()]
    # What is drawn is kept in the browser for this photo, as it is now.
    version = html.esc("/".join(map(str, (subject_id, photo.name, *times))))
    return _TOOLS.format(photo=uploads.data_uri(open_photo(photo)), version=version)


def side(context: Context, model: object, resolution: object) -> int:
    """Side in pixels that a run would train at: what was typed, else the model's own."""
    text = str(resolution or "").strip()
    if text.isdecimal() and 0 < int(text) <= _LARGEST_SIDE:
        return int(text)
    try:
        return model_info(context.allowed_model(model)).resolution
    except ValueError:
        return model_info(EMBEDDED).resolution


def subject_view(subject: subjects.StoredSubject | None, side: int, message: str = "") -> list[Any]:
    """Gallery, empty state, names, report, the way on, no photo chosen, and the captions.

    Args:
        subject: Whose photos.
        side: Pixels that they would be trained at; smaller ones are warned of.
        message: What comes before the warnings.
    """
    photos = subject.photos if subject else ()
    warnings = subjects.photo_warnings(subject, side) if subject and photos else {}
    masked = subjects.mask_labels(subject, side) if subject and photos else {}
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
        caption_rows(subject),
    ]


class CaptionsView:
    """The fields of the captions."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="captions") as self.box:
            text = (
                "What is around the subject, with the token: a photo of a sks mug on the grass. "
                "Kept as you type; Enter moves to the next photo. Empty: the instance prompt."
            )
            ui.html_block(html.heading("", "Captions", text))
            self.rows = ui.html_block(elem_id="caption-rows", js_on_load=_CAPTIONS)
            self.message = ui.html_block(elem_id="captions-said")
            # What the server has written, for the page to forget.
            self.written = gr.JSON(visible=False)
            with gr.Accordion("Captions of all photos at once", open=False):
                self._add_tools()

    def _add_tools(self) -> None:
        def caption(label: str, name: str, **options: Any) -> Any:
            return ui.line(label, name, max_length=subjects.CAPTION_LIMIT, **options)

        def button(label: str, **fields: Any) -> tuple[Any, dict[str, Any]]:
            return ui.button(label), fields

        about = "Empty removes all captions."
        text = caption("Caption of every photo", "caption-all", info=about)
        write = button("Write it for all photos", text=text)
        with gr.Row():
            find = caption("Find", "caption-find", min_width=140)
            replace = caption("Replace by", "caption-replace", min_width=140)
        substitute = button("Replace in all captions", find=find, replace=replace)
        about = "In front of every caption that does not begin with it, such as the token."
        prefix = caption("Prefix", "caption-prefix", info=about)
        # Each with its fields, by the names of `CaptionEdit`.
        self.edits = [write, substitute, button("Put it in front of all captions", prefix=prefix)]
        self.undo = ui.button("Undo the last change of all", "caption-undo")
        self.model = caption(
            "Captioning model", "caption-model",
            placeholder="Salesforce/blip-image-captioning-base",
            info="A folder or hub id: an image-to-text model of Transformers (BLIP, GIT, LLaVA "
            "...) or a WD tagger. It captions the photos that have none, with token and class.",
        )  # fmt: skip
        self.automatic = ui.button("Write missing captions with the model")


def connect_captions(context: Context, tab: CaptionsView, pick: Any) -> None:
    """Connect the fields; ``pick`` holds the id of the subject."""
    workspace = context.workspace

    def save(event: gr.EventData) -> list[Any]:
        """Write what was typed, whatever photo is shown by now."""
        typed, written, problems = getattr(event, "typed", None), dict[str, str](), list[str]()
        for place, text in typed.items() if isinstance(typed, dict) else ():
            subject_id, _, photo = str(place).partition("/")
            try:
                subjects.save_caption(workspace, subject_id, photo, text)
            except UserError as error:
                if "no longer exists" not in str(error):  # with its photo, a caption goes too
                    problems.append(f"{photo}: {error}")
                    continue
            written[place] = text
        return [html.notes(problems, "bad") or html.note("Saved", "good"), written]

    def change(names: Iterable[str]) -> Callable[..., list[Any]]:
        """A button that changes the captions of all photos."""

        def run(subject_id: str | None, *values: str) -> list[Any]:
            texts = (value or "" for value in values)
            edit = CaptionEdit(**dict(zip(names, texts, strict=True)))
            subject = subjects.read_subject(workspace, subject_id)
            if not edit:
                raise UserError("write what to change first")
            new = {name: edit(caption) for name, caption in subjects.captions_of(subject).items()}
            return done(subject, subjects.write_captions(workspace, subject.id, new))

        return run

    def undo(subject_id: str | None) -> list[Any]:
        subject = subjects.read_subject(workspace, subject_id)
        return done(subject, subjects.undo_captions(workspace, subject.id))

    def done(subject: subjects.StoredSubject, count: int) -> list[Any]:
        text = f"{counted(count, 'caption')} changed" if count else "No caption changed"
        return [caption_rows(subject), html.note(text, "good" if count else "info")]

    # One after the other, and each: what was typed last is written last.
    saved = ui.on(
        tab.rows.input, save, None, [tab.message, tab.written],
        trigger_mode="multiple", concurrency_limit=1,
    )  # fmt: skip
    ui.on(saved.success, None, [tab.written], None, js="(done) => window.ddCaptionsWritten(done)")
    outputs = [tab.rows, tab.message]
    for button, fields in tab.edits:
        ui.on(button.click, change(fields), [pick, *fields.values()], outputs, show="minimal")
    ui.on(tab.undo.click, undo, [pick], outputs, show="minimal")


def caption_rows(subject: subjects.StoredSubject | None) -> str:
    """A row for each photo: its crop, and a field for its caption."""
    return "".join(_row(subject, photo) for photo in subject.photos) if subject else ""


def _row(subject: subjects.StoredSubject, photo: Path) -> str:
    caption, damage = "", ""
    try:
        caption = read_caption(photo, "", per_line=True)
    except (ValueError, OSError) as error:
        damage = html.note(f"{error}; what you write here takes its place", "warn")
    crop = ui.image_or_blank("", subjects.training_crop, photo, _ROW_SIDE)[0]
    return (
        f"<label class='dd-caption'><img src='{uploads.data_uri(crop)}' "
        f"alt='{html.esc(photo.name)}'>"
        f"<textarea rows='2' maxlength='{subjects.CAPTION_LIMIT}' aria-label='Caption of "
        f"{html.esc(photo.name)}' data-photo='{html.esc(f'{subject.id}/{photo.name}')}'>"
        f"{html.esc(caption)}</textarea></label>{damage}"
    )
