"""The Subject tab: photos in, exactly what will be trained on out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from dora_diffusion.app import html
from dora_diffusion.app.context import Context, plain
from dora_diffusion.app.subjects import (
    Subject,
    add_photos,
    crop_and_mask,
    delete_subject,
    mask_path,
    new_subject,
    photo_path,
    photo_warnings,
    read_caption_of,
    read_subject,
    remove_photo,
    restore_original,
    sample_names,
    save_caption,
    subjects_in,
    take_sample,
    training_crop,
)
from dora_diffusion.app.uploads import MAX_BYTES, MAX_PHOTOS
from dora_diffusion.app.views.fields import id_dropdown
from dora_diffusion.app.workspace import AppError, clean_text

_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_BUSY: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
# Small photos are normal for the embedded model; for released ones this is their size.
_WARN_BELOW = 512
_EMPTY = html.empty(
    "No photos yet",
    "Add 3 to 30 photos of one subject: different views, places and light. Or take a sample.",
)


@dataclass(frozen=True)
class SubjectTab:
    """The tab's fields that others use too."""

    pick: Any
    name: Any
    create: Any
    remove: Any
    upload: Any
    samples: dict[str, Any]
    report: Any
    blank: Any
    gallery: Any
    names: Any
    chosen: Any
    editor_box: Any
    photo_title: Any
    caption: Any
    save: Any
    drop: Any
    edit: Any
    canvas: Any
    editor: Any
    apply: Any
    restore: Any


def build(context: Context) -> SubjectTab:
    """Make the fields."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            gr.HTML(
                html.heading("1", "Photos", "Of one subject. They stay on this machine."),
                padding=False,
            )
            pick = id_dropdown(
                label="Subject", info="Each keeps its photos and captions.", elem_id="subject"
            )
            upload = gr.File(
                file_count="multiple",
                file_types=["image", ".heic", ".heif"],
                label=f"Add photos: JPEG, PNG or WebP, up to {MAX_BYTES // 2**20} MB each, "
                f"{MAX_PHOTOS} at most",
                height=150,
                elem_id="upload",
            )
            report = gr.HTML("", padding=False, elem_id="report")
            names = sample_names(context.launch.samples)
            samples: dict[str, Any] = {}
            if names:
                gr.HTML(
                    "<p class='dd-quiet'>No photos at hand? Take a sample subject:</p>",
                    padding=False,
                )
                with gr.Row():
                    for name in names:
                        photo = context.launch.samples / name / "01.jpg"
                        samples[name] = gr.Button(
                            name.replace("_", " ").capitalize(),
                            icon=str(photo) if photo.is_file() else None,
                            size="md",
                            min_width=120,
                            elem_id=f"sample-{name}",
                            elem_classes="dd-sample",
                        )
            with gr.Accordion("New subject, or delete this one", open=False):
                name = gr.Textbox(label="Name of the new subject", max_lines=1, max_length=60)
                with gr.Row():
                    create = gr.Button("Make it", size="md")
                    remove = gr.Button("Delete this subject", size="md", variant="stop")
        with gr.Column(scale=7, min_width=320):
            gr.HTML(
                html.heading(
                    "2",
                    "What will be trained on",
                    "The exact crop of each photo. Click one to caption, crop or mask it.",
                ),
                padding=False,
            )
            blank = gr.HTML(_EMPTY, padding=False)
            gallery = gr.Gallery(
                show_label=False,
                visible=False,
                columns=5,
                height="auto",
                fit_columns=False,
                object_fit="contain",
                allow_preview=False,
                buttons=[],
                format="jpeg",
                elem_id="crops",
            )
            shown, chosen = gr.State([]), gr.State("")
            with gr.Group(visible=False) as editor_box:
                title = gr.HTML("", padding=False)
                caption = gr.Textbox(
                    label="Caption",
                    info="Say what is around the subject, with the token: a photo of a sks mug on "
                    "the grass. Empty: the instance prompt is used.",
                    lines=2,
                    max_length=1000,
                    elem_id="caption",
                )
                with gr.Row():
                    save = gr.Button("Save caption", variant="primary", size="md")
                    drop = gr.Button("Remove photo", size="md")
                edit = gr.Button("Crop or mask it", size="md", elem_id="edit")
                with gr.Column(visible=False) as canvas:
                    gr.HTML(
                        "<p class='dd-quiet dd-photo'>Crop with the crop tool. Or paint over the "
                        "subject: then only what is painted is learned (masked_loss).</p>",
                        padding=False,
                    )
                    editor = gr.ImageEditor(
                        type="pil",
                        show_label=False,
                        sources=("upload",),
                        transforms=("crop",),
                        layers=False,
                        brush=gr.Brush(default_size=40, colors=["#e35d2b"], color_mode="fixed"),
                        format="png",
                        buttons=[],
                        elem_id="editor",
                    )
                    with gr.Row():
                        apply = gr.Button("Use this crop and mask", size="md", elem_id="apply")
                        restore = gr.Button("Back to the original", size="md")
    return SubjectTab(
        pick, name, create, remove, upload, samples, report, blank, gallery, shown, chosen,
        editor_box, title, caption, save, drop, edit, canvas, editor, apply, restore,
    )  # fmt: skip


def connect(context: Context, tab: SubjectTab, blocks: gr.Blocks) -> None:
    """Say what the fields do."""
    workspace = context.workspace
    view = [tab.gallery, tab.blank, tab.names, tab.report, tab.editor_box, tab.chosen]

    def show(subject_id: str | None, said: str = "") -> list[Any]:
        return _view(_subject(context, subject_id), said)

    @plain
    def select(subject_id: str | None) -> list[Any]:
        return show(subject_id)

    @plain
    def load(subject_id: str | None) -> list[Any]:
        return [_choices(context, subject_id), *show(_current(context, subject_id))]

    @plain
    def upload(files: list[str] | None, subject_id: str | None) -> list[Any]:
        if not files:
            return [gr.skip()] * (2 + len(view))
        if not subject_id:
            subject_id = new_subject(workspace, "My subject")
        result = add_photos(workspace, subject_id, files)
        said = html.notes(result.refused, "bad")
        if result.accepted:
            count = len(result.accepted)
            said = html.note(f"{count} photo{'s' if count != 1 else ''} added", "good") + said
        return [None, _choices(context, subject_id), *show(subject_id, said)]

    @plain
    def create(title: str) -> list[Any]:
        title = clean_text(title, 60, "name")
        if not title:
            raise AppError("give the new subject a name first")
        subject_id = new_subject(workspace, title)
        return ["", _choices(context, subject_id), *show(subject_id)]

    @plain
    def remove(subject_id: str | None) -> list[Any]:
        if not subject_id:  # nothing to delete, or not confirmed
            return [gr.skip()] * (1 + len(view))
        delete_subject(workspace, subject_id)
        current = _current(context, None)
        return [_choices(context, current), *show(current, html.note("Subject deleted", "info"))]

    # Choosing is an input, not a change: answers to other events must not run it again.
    tab.pick.input(select, [tab.pick], view, **_QUIET)
    tab.upload.upload(upload, [tab.upload, tab.pick], [tab.upload, tab.pick, *view], **_BUSY)
    tab.create.click(create, [tab.name], [tab.name, tab.pick, *view], **_QUIET)
    tab.remove.click(
        remove,
        [tab.pick],
        [tab.pick, *view],
        js="(id) => confirm('Delete this subject with its photos and captions?') ? id : ''",
        **_QUIET,
    )
    for name, button in tab.samples.items():

        def take(name: str = name) -> list[Any]:
            subject_id = take_sample(workspace, context.launch.samples, name)
            said = html.note("A sample subject, ready to train: go on to the Train tab.", "good")
            return [_choices(context, subject_id), *show(subject_id, said)]

        button.click(plain(take), [], [tab.pick, *view], **_BUSY)
    blocks.load(load, [tab.pick], [tab.pick, *view], **_QUIET)
    _connect_photo(context, tab, view)


def _connect_photo(context: Context, tab: SubjectTab, view: list[Any]) -> None:
    """What can be done with the photo that was clicked."""
    workspace = context.workspace
    photo_fields = [tab.chosen, tab.editor_box, tab.photo_title, tab.caption, tab.canvas]

    @plain
    def choose(subject_id: str, names: list[str], event: gr.SelectData) -> list[Any]:
        if not isinstance(event.index, int) or not 0 <= event.index < len(names):
            raise AppError("this photo no longer exists; choose another one")
        return _photo(context, subject_id, names[event.index])

    @plain
    def save(subject_id: str, photo: str, text: str) -> list[Any]:
        caption = save_caption(workspace, subject_id, photo, text)
        said = html.note(f"Caption of {photo} saved", "good")
        gallery, _, names, report, *_ = _view(read_subject(workspace, subject_id), said)
        return [caption, gallery, names, report]

    @plain
    def drop(subject_id: str, photo: str) -> list[Any]:
        remove_photo(workspace, subject_id, photo)
        return _view(read_subject(workspace, subject_id), html.note(f"{photo} removed", "info"))

    @plain
    def edit(subject_id: str, photo: str) -> dict[str, Any]:
        path = str(photo_path(workspace, subject_id, photo))
        return {"background": path, "layers": [], "composite": path}

    @plain
    def apply(subject_id: str, photo: str, value: dict[str, Any] | None) -> list[Any]:
        path = photo_path(workspace, subject_id, photo)
        if not value or value.get("background") is None:
            raise AppError("there is no picture in the editor; click a photo first")
        layers = value.get("layers") or []
        painted = layers[0].getchannel("A") if layers and layers[0].mode == "RGBA" else None
        crop_and_mask(path, value["background"], painted)
        said = html.note(f"Crop and mask of {photo} saved", "good")
        return _view(read_subject(workspace, subject_id), said)

    @plain
    def restore(subject_id: str, photo: str) -> list[Any]:
        restore_original(photo_path(workspace, subject_id, photo))
        said = html.note(f"{photo} is as it was", "info")
        return _view(read_subject(workspace, subject_id), said)

    tab.gallery.select(choose, [tab.pick, tab.names], photo_fields, **_QUIET)
    tab.save.click(
        save,
        [tab.pick, tab.chosen, tab.caption],
        [tab.caption, tab.gallery, tab.names, tab.report],
        **_QUIET,
    )
    tab.drop.click(drop, [tab.pick, tab.chosen], view, **_QUIET)
    # An editor draws nothing while it is hidden: its picture comes when it is opened.
    opened = tab.edit.click(lambda: gr.update(visible=True), None, [tab.canvas], **_QUIET)
    opened.then(edit, [tab.pick, tab.chosen], [tab.editor], **_QUIET)
    tab.apply.click(apply, [tab.pick, tab.chosen, tab.editor], view, **_BUSY)
    tab.restore.click(restore, [tab.pick, tab.chosen], view, **_BUSY)


def _photo(context: Context, subject_id: str, photo: str) -> list[Any]:
    path = photo_path(context.workspace, subject_id, photo)
    title = f"<div class='dd-heading dd-photo'><h2>{html.esc(photo)}</h2></div>"
    return [photo, gr.update(visible=True), title, read_caption_of(path), gr.update(visible=False)]


def _subject(context: Context, subject_id: str | None) -> Subject | None:
    return read_subject(context.workspace, subject_id) if subject_id else None


def _current(context: Context, subject_id: str | None) -> str | None:
    """The subject that is asked for, else the newest."""
    ids = [subject.id for subject in subjects_in(context.workspace)]
    return subject_id if subject_id in ids else next(iter(ids), None)


def _choices(context: Context, subject_id: str | None) -> Any:
    subjects = subjects_in(context.workspace)
    choices = [(f"{one.title} ({len(one.photos)} photos)", one.id) for one in subjects]
    return gr.update(choices=choices, value=_current(context, subject_id))


def _view(subject: Subject | None, said: str = "") -> list[Any]:
    """Gallery, empty state, names, report, and no photo chosen."""
    photos = subject.photos if subject else ()
    warnings = photo_warnings(subject, _WARN_BELOW) if subject and photos else {}
    crops = [(training_crop(photo), _label(photo, warnings)) for photo in photos]
    lines = [line for group in warnings.values() for line in group]
    unique = list(dict.fromkeys(lines))
    return [
        gr.update(value=crops, visible=bool(crops), selected_index=None),
        gr.update(visible=not crops),
        [photo.name for photo in photos],
        said + html.notes(unique, "warn"),
        gr.update(visible=False),
        "",
    ]


def _label(photo: Any, warnings: dict[str, list[str]]) -> str:
    """A photo's caption in the gallery, with a mark where something is wrong with it."""
    mark = "⚠ " if photo.name in warnings else ""
    masked = " (masked)" if mask_path(photo).exists() else ""
    return f"{mark}{read_caption_of(photo) or photo.name}{masked}"
