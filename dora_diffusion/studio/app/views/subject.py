"""The Subject tab: photos in, exactly what will be trained on out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.wording import counted
from dora_diffusion.data.checks import WANTED
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context, plain
from dora_diffusion.studio.app.views import captions, photo
from dora_diffusion.studio.app.views.fields import (
    BUSY,
    CLICKS,
    QUIET,
    clicked,
    gallery,
    html_block,
    id_dropdown,
)
from dora_diffusion.studio.app.views.tasks import task_card
from dora_diffusion.studio.jobs.queue import stop_job
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.subjects import (
    StoredSubject,
    add_photos,
    delete_subject,
    new_subject,
    read_subject,
    sample_names,
    subjects_in,
    take_sample,
)
from dora_diffusion.studio.jobs.tasks import looks_at, start_look
from dora_diffusion.studio.jobs.uploads import MAX_BYTES, MAX_PHOTOS
from dora_diffusion.studio.jobs.workspace import REMAINS, UserError, clean_text

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
        text = "Of one subject, with .txt captions beside them. They stay on this machine."
        html_block(html.heading("1", "Photos", text))
        self.pick = id_dropdown(
            label="Subject",
            info="Each keeps its photos and captions.",
            visible=False,
            elem_id="subject",
        )
        self.place = html_block(_place(None), elem_id="upload-to")
        self.upload = gr.File(
            file_count="multiple",
            file_types=["image", ".heic", ".heif", ".txt"],
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
        text = "The exact crop of each photo. Click one to crop, mask or remove it."
        html_block(html.heading("2", "Training images", text))
        self.blank = html_block(_EMPTY)
        self.gallery = gallery(
            visible=False, columns=5, allow_preview=False, format="jpeg", elem_id="crops"
        )
        self.names = gr.State([])
        self.editing = photo.PhotoView()
        self.captions = captions.CaptionsView()
        self.look = gr.Button("Check photos", size="md", elem_id="look")
        self.looked = html_block(elem_id="looked", js_on_load=CLICKS)
        self.to_train = gr.Button(
            "Next: train on these photos", variant="primary", visible=False, elem_id="to-train"
        )

    @property
    def view(self) -> list[Any]:
        """Fields that `photo.subject_view` fills."""
        editing = self.editing
        return [
            self.gallery, self.blank, self.names, self.report, self.to_train,
            editing.box, editing.chosen, self.captions.box, self.captions.rows,
        ]  # fmt: skip

    @property
    def choice(self) -> list[Any]:
        """Fields that `_choices` fills."""
        return [self.pick, self.place]


def connect(context: Context, tab: SubjectTab, restored: Any, size: list[Any]) -> None:
    """Connect the fields to their actions.

    Args:
        context: The app.
        tab: The fields.
        restored: The event of the page being loaded, after what was chosen before.
        size: The fields of base model and resolution.
    """
    outputs = [*tab.choice, *tab.view]

    @plain
    def select(subject_id: str | None, *chosen: Any) -> list[Any]:
        return [_place(_stored(context, subject_id)), *_show(context, subject_id, chosen)]

    @plain
    def resize(subject_id: str | None, *chosen: Any) -> str:
        return str(_show(context, subject_id, chosen)[3])

    @plain
    def load(subject_id: str | None, *chosen: Any) -> list[Any]:
        current = current_subject(context, subject_id)
        return [*_choices(context, subject_id), *_show(context, current, chosen)]

    @plain
    def remove(subject_id: str | None, *chosen: Any) -> list[Any]:
        if not subject_id:  # nothing to delete, or not confirmed
            return [gr.skip()] * len(outputs)
        text = "Subject deleted" + (
            "" if delete_subject(context.workspace, subject_id) else REMAINS
        )
        current, message = current_subject(context, None), html.note(text, "info")
        return [*_choices(context, current), *_show(context, current, chosen, message)]

    # Choosing is an input, not a change: answers to other events must not run it again.
    tab.pick.input(select, [tab.pick, *size], [tab.place, *tab.view], **QUIET)
    gr.on([field.change for field in size], resize, [tab.pick, *size], [tab.report], **QUIET)
    tab.remove.click(
        remove,
        [tab.pick, *size],
        outputs,
        js="(id, ...rest) => [confirm('Delete this subject with its photos and captions? "
        "Runs that were trained on it keep copies.')"
        " ? id : '', ...rest]",
        **QUIET,
    )
    restored.then(load, [tab.pick, *size], outputs, **QUIET)
    _connect_upload(context, tab, size)
    _connect_new(context, tab, size)
    _connect_look(context, tab, size)
    captions.connect(context, tab.captions, tab.pick)
    photo.connect(context, tab.editing, [tab.pick, *size], tab.view)


def _connect_new(context: Context, tab: SubjectTab, size: list[Any]) -> None:
    """New subjects: named ones, and samples."""
    workspace = context.workspace

    @plain
    def create(title: str, *chosen: Any) -> list[Any]:
        title = clean_text(title, 60, "name")
        if not title:
            raise UserError("give the new subject a name first")
        subject_id = new_subject(workspace, title)
        return ["", *_choices(context, subject_id), *_show(context, subject_id, chosen)]

    @plain
    def take(event: gr.EventData, *chosen: Any) -> list[Any]:
        subject_id = take_sample(workspace, context.launch.samples, clicked(event)[1])
        message = html.note("A sample subject, ready to train.", "good")
        return [*_choices(context, subject_id), *_show(context, subject_id, chosen, message)]

    outputs = [*tab.choice, *tab.view]
    gr.on(
        [tab.create.click, tab.name.submit], create, [tab.name, *size], [tab.name, *outputs],
        **QUIET,
    )  # fmt: skip
    tab.samples.click(take, size, outputs, **BUSY)


def _connect_upload(context: Context, tab: SubjectTab, size: list[Any]) -> None:
    """Photos of the subject that is chosen, or of a new one."""
    workspace, outputs = context.workspace, [*tab.choice, *tab.view]

    @plain
    def upload(
        files: list[str] | None, subject_id: str | None, name: str, *chosen: Any
    ) -> list[Any]:
        if not files:
            return [gr.skip()] * (2 + len(outputs))
        is_new = not subject_id
        if is_new:
            subject_id = new_subject(workspace, clean_text(name, 60, "name") or _new_title(context))
        stored = read_subject(workspace, subject_id)
        result = add_photos(workspace, stored.id, files)
        if is_new and not result.accepted:
            delete_subject(workspace, stored.id)
            message = html.notes(result.refused, "bad")
            return [
                None,
                gr.skip(),
                *_choices(context, None),
                *_show(context, None, chosen, message),
            ]
        added = [
            counted(len(names), noun)
            for noun, names in (("photo", result.accepted), ("caption", result.captions))
            if names
        ]
        kind = "the new subject" if is_new else "the subject"
        text = f"{' and '.join(added)} added to {kind} {stored.title}" if added else ""
        message = html.note(text, "good") + html.notes(result.refused, "bad")
        return [
            None,
            "",
            *_choices(context, subject_id),
            *_show(context, subject_id, chosen, message),
        ]

    tab.upload.upload(
        upload, [tab.upload, tab.pick, tab.name, *size], [tab.upload, tab.name, *outputs],
        js=_ASK, **BUSY,
    )  # fmt: skip


def _connect_look(context: Context, tab: SubjectTab, size: list[Any]) -> None:
    """Connect the button that inspects the photos by ``dora-diffusion prepare``."""

    @plain
    def look(subject_id: str | None, *chosen: Any) -> str:
        subject = read_subject(context.workspace, subject_id)
        start_look(context.workspace, subject, photo.side(context, *chosen))
        context.queue.tick()
        return refresh(context, context.jobs(fresh=True), subject_id)["looked"]

    @plain
    def automatic(subject_id: str | None, model: str, *chosen: Any) -> str:
        name = str(model or "").strip()
        if not name:
            raise UserError("name a captioning model first: a folder, or a hub id")
        subject = read_subject(context.workspace, subject_id)
        side = photo.side(context, *chosen)
        start_look(context.workspace, subject, side, context.allowed_model(name))
        context.queue.tick()
        return refresh(context, context.jobs(fresh=True), subject_id)["looked"]

    @plain
    def reread(subject_id: str | None) -> Any:
        """The captions that a job has written meanwhile."""
        stored = _stored(context, subject_id)
        jobs = looks_at(context.jobs(), stored) if stored else []
        return captions.caption_rows(stored) if jobs and jobs[0].has_ended else gr.skip()

    @plain
    def stop(subject_id: str | None, event: gr.EventData) -> str:
        stop_job(context.workspace.job(clicked(event)[1]))
        return refresh(context, context.jobs(fresh=True), subject_id)["looked"]

    tab.look.click(look, [tab.pick, *size], [tab.looked], **BUSY)
    model = tab.captions.model
    tab.captions.automatic.click(automatic, [tab.pick, model, *size], [tab.looked], **BUSY)
    tab.looked.click(stop, [tab.pick], [tab.looked], **QUIET)
    tab.looked.change(reread, [tab.pick], [tab.captions.rows], **QUIET)


def refresh(context: Context, jobs: Sequence[Job], subject_id: str | None) -> dict[str, str]:
    """Return the timer's update of this tab: the last look at the photos."""
    try:
        subject = read_subject(context.workspace, subject_id)
    except UserError:
        return {"looked": ""}
    return {"looked": "".join(map(task_card, looks_at(jobs, subject)[:1]))}


def _show(
    context: Context, subject_id: str | None, chosen: Sequence[Any], message: str = ""
) -> list[Any]:
    """A subject's photos; ``chosen`` are the base model and the resolution."""
    return photo.subject_view(_stored(context, subject_id), photo.side(context, *chosen), message)


def _stored(context: Context, subject_id: str | None) -> StoredSubject | None:
    return read_subject(context.workspace, subject_id) if subject_id else None


def _new_title(context: Context) -> str:
    """A name that no subject has yet."""
    titles = {subject.title for subject in subjects_in(context.workspace)}
    names = ["My subject", *(f"My subject {number}" for number in range(2, len(titles) + 3))]
    return next(name for name in names if name not in titles)


# Asks before photos join a sample; without a subject's id they become one of their own.
_ASK = """(files, id, ...rest) => {
  const sample = files?.length && document.querySelector('[data-sample]')?.dataset.sample;
  const asked = `Add these photos to the sample ${sample}? All photos of a subject are learned as `
    + 'one. Cancel makes a new subject of them.';
  return [files, sample && !confirm(asked) ? '' : id, ...rest];
}"""


def _place(subject: StoredSubject | None) -> str:
    """Describe where added photos go."""
    if subject is None:
        return html.quiet("Photos that you add become a new subject.")
    if not subject.sample:
        return html.quiet(f"Photos that you add join {subject.title}.")
    text = f"{subject.title} is a sample. Photos that you add become a new subject, unless you "
    mark = f"data-sample='{html.esc(subject.title)}'"
    return f"<div {mark}>{html.quiet(text + 'choose to add them to the sample.')}</div>"


def current_subject(context: Context, subject_id: str | None) -> str | None:
    """The subject that is asked for, else the newest."""
    ids = [subject.id for subject in subjects_in(context.workspace)]
    return subject_id if subject_id in ids else next(iter(ids), None)


def _choices(context: Context, subject_id: str | None) -> list[Any]:
    """The subjects to choose from, and where added photos go."""
    subjects = subjects_in(context.workspace)
    choices = [(f"{each.title} ({len(each.photos)} photos)", each.id) for each in subjects]
    current = current_subject(context, subject_id)
    listed = gr.update(choices=choices, value=current, visible=bool(choices))
    return [listed, _place(_stored(context, current))]


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
    offer = "No photos at hand? Take a sample: the embedded model learns it in some minutes."
    return f"{html.quiet(offer)}<div class='dd-samples'>{cards}</div>"
