"""The Subject tab: photos in, exactly what will be trained on out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.app import html
from dora_diffusion.app.context import Context, plain
from dora_diffusion.app.views import photo
from dora_diffusion.app.views.fields import BUSY, CLICKS, QUIET, clicked, id_dropdown
from dora_diffusion.data.checks import WANTED
from dora_diffusion.jobs.subjects import (
    Subject,
    add_photos,
    delete_subject,
    new_subject,
    read_subject,
    sample_names,
    subjects_in,
    take_sample,
)
from dora_diffusion.jobs.uploads import MAX_BYTES, MAX_PHOTOS
from dora_diffusion.jobs.workspace import AppError, clean_text

_EMPTY = html.empty(
    "No photos yet",
    f"Add {WANTED}. Or take a sample.",
)


@dataclass(frozen=True)
class SubjectTab:
    """The tab's fields that others use too."""

    pick: Any
    name: Any
    create: Any
    remove: Any
    upload: Any
    samples: Any
    report: Any
    blank: Any
    gallery: Any
    names: Any
    editing: photo.PhotoView
    go_on: Any


def build(context: Context) -> SubjectTab:
    """Make the fields."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            gr.HTML(
                html.heading("1", "Photos", "Of one subject. They stay on this machine."),
                padding=False,
            )
            pick = id_dropdown(
                label="Subject",
                info="Each keeps its photos and captions.",
                visible=False,
                elem_id="subject",
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
            samples = gr.HTML(
                _sample_cards(context.launch.samples),
                padding=False,
                elem_id="samples-to-take",
                js_on_load=CLICKS,
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
            names = gr.State([])
            editing = photo.build()
            go_on = gr.Button(
                "Next: train on these photos", variant="primary", visible=False, elem_id="to-train"
            )
    return SubjectTab(
        pick, name, create, remove, upload, samples, report, blank, gallery, names, editing, go_on
    )


def connect(context: Context, tab: SubjectTab, blocks: gr.Blocks, size: list[Any]) -> None:
    """Say what the fields do; ``size`` are the fields of base model and resolution."""
    workspace = context.workspace
    editing = tab.editing
    view = [tab.gallery, tab.blank, tab.names, tab.report, tab.go_on, editing.box, editing.chosen]

    def show(subject_id: str | None, side: int, said: str = "") -> list[Any]:
        return photo.subject_view(_subject(context, subject_id), side, said)

    @plain
    def select(subject_id: str | None, *chosen: Any) -> list[Any]:
        return show(subject_id, photo.side(context, *chosen))

    @plain
    def resize(subject_id: str | None, *chosen: Any) -> str:
        return str(show(subject_id, photo.side(context, *chosen))[3])

    @plain
    def load(subject_id: str | None, *chosen: Any) -> list[Any]:
        current = current_subject(context, subject_id)
        return [_choices(context, subject_id), *show(current, photo.side(context, *chosen))]

    @plain
    def upload(files: list[str] | None, subject_id: str | None, *chosen: Any) -> list[Any]:
        if not files:
            return [gr.skip()] * (2 + len(view))
        if not subject_id:
            subject_id = new_subject(workspace, "My subject")
        result = add_photos(workspace, subject_id, files)
        said = html.notes(result.refused, "bad")
        if result.accepted:
            count = len(result.accepted)
            said = html.note(f"{count} photo{'s' if count != 1 else ''} added", "good") + said
        return [
            None,
            _choices(context, subject_id),
            *show(subject_id, photo.side(context, *chosen), said),
        ]

    @plain
    def create(title: str, *chosen: Any) -> list[Any]:
        title = clean_text(title, 60, "name")
        if not title:
            raise AppError("give the new subject a name first")
        subject_id = new_subject(workspace, title)
        return ["", _choices(context, subject_id), *show(subject_id, photo.side(context, *chosen))]

    @plain
    def remove(subject_id: str | None, *chosen: Any) -> list[Any]:
        if not subject_id:  # nothing to delete, or not confirmed
            return [gr.skip()] * (1 + len(view))
        delete_subject(workspace, subject_id)
        current, said = current_subject(context, None), html.note("Subject deleted", "info")
        return [_choices(context, current), *show(current, photo.side(context, *chosen), said)]

    @plain
    def take(event: gr.EventData, *chosen: Any) -> list[Any]:
        subject_id = take_sample(workspace, context.launch.samples, clicked(event)[1])
        said = html.note("A sample subject, ready to train.", "good")
        return [
            _choices(context, subject_id),
            *show(subject_id, photo.side(context, *chosen), said),
        ]

    # Choosing is an input, not a change: answers to other events must not run it again.
    tab.pick.input(select, [tab.pick, *size], view, **QUIET)
    gr.on([field.change for field in size], resize, [tab.pick, *size], [tab.report], **QUIET)
    tab.upload.upload(upload, [tab.upload, tab.pick, *size], [tab.upload, tab.pick, *view], **BUSY)
    tab.create.click(create, [tab.name, *size], [tab.name, tab.pick, *view], **QUIET)
    tab.remove.click(
        remove,
        [tab.pick, *size],
        [tab.pick, *view],
        js="(id, ...rest) => [confirm('Delete this subject with its photos and captions?')"
        " ? id : '', ...rest]",
        **QUIET,
    )
    tab.samples.click(take, size, [tab.pick, *view], **BUSY)
    blocks.load(load, [tab.pick, *size], [tab.pick, *view], **QUIET)
    photo.connect(context, editing, [tab.pick, *size], view)


def _subject(context: Context, subject_id: str | None) -> Subject | None:
    return read_subject(context.workspace, subject_id) if subject_id else None


def current_subject(context: Context, subject_id: str | None) -> str | None:
    """The subject that is asked for, else the newest."""
    ids = [subject.id for subject in subjects_in(context.workspace)]
    return subject_id if subject_id in ids else next(iter(ids), None)


def _choices(context: Context, subject_id: str | None) -> Any:
    subjects = subjects_in(context.workspace)
    choices = [(f"{one.title} ({len(one.photos)} photos)", one.id) for one in subjects]
    current = current_subject(context, subject_id)
    return gr.update(choices=choices, value=current, visible=bool(choices))


def _sample_cards(samples: Path) -> str:
    """The project's samples as pictures to press; nothing where the app was started elsewhere."""
    cards = "".join(
        f"<button class='dd-sample' id='sample-{html.esc(name)}' data-do='take' "
        f"data-value='{html.esc(name)}'>{html.picture(samples / name / '01.jpg', '')}"
        f"<span>{html.esc(name.replace('_', ' ').capitalize())}</span></button>"
        for name in sample_names(samples)
    )
    if not cards:
        return ""
    return (
        "<p class='dd-quiet'>No photos at hand? Take a sample: the embedded model learns it in a "
        f"minute or two.</p><div class='dd-samples'>{cards}</div>"
    )
