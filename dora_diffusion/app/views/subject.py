"""The Subject tab: photos in, exactly what will be trained on out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.app import html
from dora_diffusion.app.context import Context, plain
from dora_diffusion.app.views import photo
from dora_diffusion.app.views.fields import (
    BUSY,
    CLICKS,
    QUIET,
    clicked,
    gallery,
    html_block,
    id_dropdown,
)
from dora_diffusion.app.views.tasks import task_card
from dora_diffusion.data.checks import WANTED
from dora_diffusion.jobs.queue import stop_job
from dora_diffusion.jobs.snapshot import Job
from dora_diffusion.jobs.subjects import (
    add_photos,
    delete_subject,
    new_subject,
    read_subject,
    sample_names,
    subjects_in,
    take_sample,
)
from dora_diffusion.jobs.tasks import looks_at, start_look
from dora_diffusion.jobs.uploads import MAX_BYTES, MAX_PHOTOS
from dora_diffusion.jobs.workspace import REMAINS, UserError, clean_text
from dora_diffusion.wording import counted

_EMPTY = html.empty("No photos yet", f"Add {WANTED}. Or take a sample.")


class SubjectTab:
    """The tab's fields."""

    def __init__(self, context: Context) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                self._add_photos(context)
            with gr.Column(scale=7, min_width=320):
                self._add_crops()

    def _add_photos(self, context: Context) -> None:
        html_block(html.heading("1", "Photos", "Of one subject. They stay on this machine."))
        self.pick = id_dropdown(
            label="Subject",
            info="Each keeps its photos and captions.",
            visible=False,
            elem_id="subject",
        )
        self.upload = gr.File(
            file_count="multiple",
            file_types=["image", ".heic", ".heif"],
            label=f"Add photos: JPEG, PNG or WebP, up to {MAX_BYTES // 2**20} MB each, "
            f"{MAX_PHOTOS} at most",
            height=150,
            elem_id="upload",
        )
        self.report = html_block(elem_id="report")
        cards = _sample_cards(context.launch.samples)
        self.samples = html_block(cards, elem_id="samples-to-take", js_on_load=CLICKS)
        with gr.Accordion("New subject, or delete this one", open=False):
            self.name = gr.Textbox(label="Name of the new subject", max_lines=1, max_length=60)
            with gr.Row():
                self.create = gr.Button("Make it", size="md")
                self.remove = gr.Button("Delete this subject", size="md", variant="stop")

    def _add_crops(self) -> None:
        text = "The exact crop of each photo. Click one to caption, crop or mask it."
        html_block(html.heading("2", "Training images", text))
        self.blank = html_block(_EMPTY)
        self.gallery = gallery(
            visible=False, columns=5, allow_preview=False, format="jpeg", elem_id="crops"
        )
        self.names = gr.State([])
        self.editing = photo.PhotoView()
        self.look = gr.Button(
            "Look for blurred, nearly equal and small photos", size="md", elem_id="look"
        )
        self.looked = html_block(elem_id="looked", js_on_load=CLICKS)
        self.to_train = gr.Button(
            "Next: train on these photos", variant="primary", visible=False, elem_id="to-train"
        )

    @property
    def view(self) -> list[Any]:
        """What `photo.subject_view` fills."""
        editing = self.editing
        return [
            self.gallery, self.blank, self.names, self.report, self.to_train,
            editing.box, editing.chosen,
        ]  # fmt: skip


def connect(context: Context, tab: SubjectTab, blocks: gr.Blocks, size: list[Any]) -> None:
    """Say what the fields do; ``size`` are the fields of base model and resolution."""

    @plain
    def select(subject_id: str | None, *chosen: Any) -> list[Any]:
        return _show(context, subject_id, chosen)

    @plain
    def resize(subject_id: str | None, *chosen: Any) -> str:
        return str(_show(context, subject_id, chosen)[3])

    @plain
    def load(subject_id: str | None, *chosen: Any) -> list[Any]:
        current = current_subject(context, subject_id)
        return [_choices(context, subject_id), *_show(context, current, chosen)]

    @plain
    def remove(subject_id: str | None, *chosen: Any) -> list[Any]:
        if not subject_id:  # nothing to delete, or not confirmed
            return [gr.skip()] * (1 + len(tab.view))
        text = "Subject deleted" + (
            "" if delete_subject(context.workspace, subject_id) else REMAINS
        )
        current, message = current_subject(context, None), html.note(text, "info")
        return [_choices(context, current), *_show(context, current, chosen, message)]

    # Choosing is an input, not a change: answers to other events must not run it again.
    tab.pick.input(select, [tab.pick, *size], tab.view, **QUIET)
    gr.on([field.change for field in size], resize, [tab.pick, *size], [tab.report], **QUIET)
    tab.remove.click(
        remove,
        [tab.pick, *size],
        [tab.pick, *tab.view],
        js="(id, ...rest) => [confirm('Delete this subject with its photos and captions? "
        "Runs that were trained on it keep copies.')"
        " ? id : '', ...rest]",
        **QUIET,
    )
    blocks.load(load, [tab.pick, *size], [tab.pick, *tab.view], **QUIET)
    _connect_new(context, tab, size)
    _connect_look(context, tab, size)
    photo.connect(context, tab.editing, [tab.pick, *size], tab.view)


def _connect_new(context: Context, tab: SubjectTab, size: list[Any]) -> None:
    """New subjects, and new photos of one."""
    workspace = context.workspace

    @plain
    def upload(files: list[str] | None, subject_id: str | None, *chosen: Any) -> list[Any]:
        if not files:
            return [gr.skip()] * (2 + len(tab.view))
        if not subject_id:
            subject_id = new_subject(workspace, "My subject")
        result = add_photos(workspace, subject_id, files)
        message = html.notes(result.refused, "bad")
        if result.accepted:
            message = html.note(f"{counted(len(result.accepted), 'photo')} added", "good") + message
        return [None, _choices(context, subject_id), *_show(context, subject_id, chosen, message)]

    @plain
    def create(title: str, *chosen: Any) -> list[Any]:
        title = clean_text(title, 60, "name")
        if not title:
            raise UserError("give the new subject a name first")
        subject_id = new_subject(workspace, title)
        return ["", _choices(context, subject_id), *_show(context, subject_id, chosen)]

    @plain
    def take(event: gr.EventData, *chosen: Any) -> list[Any]:
        subject_id = take_sample(workspace, context.launch.samples, clicked(event)[1])
        message = html.note("A sample subject, ready to train.", "good")
        return [_choices(context, subject_id), *_show(context, subject_id, chosen, message)]

    outputs = [tab.pick, *tab.view]
    tab.upload.upload(upload, [tab.upload, tab.pick, *size], [tab.upload, *outputs], **BUSY)
    tab.create.click(create, [tab.name, *size], [tab.name, *outputs], **QUIET)
    tab.samples.click(take, size, outputs, **BUSY)


def _connect_look(context: Context, tab: SubjectTab, size: list[Any]) -> None:
    """Have ``dora-diffusion prepare`` look at the photos."""

    @plain
    def look(subject_id: str | None, *chosen: Any) -> str:
        subject = read_subject(context.workspace, subject_id)
        start_look(context.workspace, subject, photo.side(context, *chosen))
        context.queue.tick()
        return refresh(context, context.jobs(fresh=True), subject_id)["looked"]

    @plain
    def stop(subject_id: str | None, event: gr.EventData) -> str:
        stop_job(context.workspace.job(clicked(event)[1]))
        return refresh(context, context.jobs(fresh=True), subject_id)["looked"]

    tab.look.click(look, [tab.pick, *size], [tab.looked], **BUSY)
    tab.looked.click(stop, [tab.pick], [tab.looked], **QUIET)


def refresh(context: Context, jobs: Sequence[Job], subject_id: str | None) -> dict[str, str]:
    """What the clock sends to this tab: the last look at the photos."""
    try:
        subject = read_subject(context.workspace, subject_id)
    except UserError:
        return {"looked": ""}
    return {"looked": "".join(map(task_card, looks_at(jobs, subject)[:1]))}


def _show(
    context: Context, subject_id: str | None, chosen: Sequence[Any], message: str = ""
) -> list[Any]:
    """A subject's photos; ``chosen`` are the base model and the resolution."""
    subject = read_subject(context.workspace, subject_id) if subject_id else None
    return photo.subject_view(subject, photo.side(context, *chosen), message)


def current_subject(context: Context, subject_id: str | None) -> str | None:
    """The subject that is asked for, else the newest."""
    ids = [subject.id for subject in subjects_in(context.workspace)]
    return subject_id if subject_id in ids else next(iter(ids), None)


def _choices(context: Context, subject_id: str | None) -> Any:
    subjects = subjects_in(context.workspace)
    choices = [(f"{each.title} ({len(each.photos)} photos)", each.id) for each in subjects]
    current = current_subject(context, subject_id)
    return gr.update(choices=choices, value=current, visible=bool(choices))


def _sample_cards(samples: Path) -> str:
    """The project's samples as images to press; nothing where the app was started elsewhere."""
    cards = "".join(
        html.picture_card(
            samples / name / "01.jpg", "take", name, name.replace("_", " ").capitalize()
        )
        for name in sample_names(samples)
    )
    if not cards:
        return ""
    offer = "No photos at hand? Take a sample: the embedded model learns it in a minute or two."
    return f"{html.quiet(offer)}<div class='dd-samples'>{cards}</div>"
