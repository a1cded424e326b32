"""The Subject tab: upload of photos, and a preview of the exact training images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.wording import counted
from dora_diffusion.data.checks import WANTED
from dora_diffusion.models.embedded import samples_folder
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import captions, photo, ui
from dora_diffusion.studio.jobs import subjects
from dora_diffusion.studio.jobs.deletions import subject_question
from dora_diffusion.studio.jobs.queue import stop_job
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.store import GONE, REMAINS, UserError, Workspace, clean_text
from dora_diffusion.studio.jobs.tasks import looks_at, start_look
from dora_diffusion.studio.jobs.uploads import MAX_BYTES, MAX_PHOTOS, Upload

_EMPTY = html.empty("No photos yet", f"Add {WANTED}. Or take a sample.")


class SubjectTab:
    """Fields of the tab."""

    def __init__(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                self._add_photos()
            with gr.Column(scale=7, min_width=320):
                self._add_crops()
        self.captions = captions.CaptionsView()
        self.to_train = ui.button(
            "Next: train on these photos", "to-train", variant="primary", visible=False, size="lg"
        )

    def _add_photos(self) -> None:
        text = (
            "Photos of one subject as JPEG, PNG or WebP, with optional .txt captions. They stay on "
            "this machine."
        )
        ui.html_block(html.heading("1", "Photos", text))
        self.pick = ui.id_dropdown(
            label="Subject",
            info="Each keeps its photos and captions.",
            visible=False,
            elem_id="subject",
        )
        self.place = ui.html_block(html.pieces.place(None), elem_id="upload-to")
        self.upload = gr.File(
            file_count="multiple",
            file_types=["image", ".heic", ".heif", ".txt"],
            label=f"Up to {MAX_PHOTOS} photos, of at most {MAX_BYTES // 2**20} MB each",
            height=150,
            elem_id="upload",
        )
        self.report = ui.html_block(elem_id="report")
        cards = _sample_cards(samples_folder())
        self.samples = ui.html_block(cards, elem_id="samples-to-take", js_on_load=ui.CLICKS)
        with gr.Accordion("New subject, or delete this one", open=False):
            self.name = gr.Textbox(label="Name of the new subject", max_lines=1, max_length=60)
            with gr.Row():
                self.create = ui.button("Make it")
                self.remove = ui.button("Delete this subject", variant="stop")

    def _add_crops(self) -> None:
        text = "The exact crop of each photo. Click one to crop, mask or remove it."
        ui.html_block(html.heading("2", "Training images", text))
        self.blank = ui.html_block(_EMPTY)
        self.gallery = ui.gallery(
            visible=False, columns=5, allow_preview=False, format="jpeg", elem_id="crops"
        )
        self.names = gr.State([])
        self.editing = photo.PhotoView()
        self.look = ui.button("Check photos", "look")
        self.looked = ui.html_block(elem_id="looked", js_on_load=ui.CLICKS)


def connect(context: Context, tab: SubjectTab, restored: Any, preview: list[Any]) -> None:
    """Connect the fields to their actions.

    Args:
        context: The app.
        tab: The fields.
        restored: Event after the page was loaded and its draft restored.
        preview: Fields of base model, resolution and masked_loss, see `photo.Preview`.
    """
    workspace = context.workspace
    view = [
        tab.gallery, tab.blank, tab.names, tab.report, tab.to_train, tab.editing.box,
        tab.editing.chosen, tab.captions.box, tab.captions.tags, tab.captions.rows,
    ]  # fmt: skip
    inputs, outputs = [tab.pick, *preview], [tab.pick, tab.place, *view]

    def load(subject_id: str | None, *form: Any) -> list[Any]:
        return _show(context, subject_id, form)

    def select(subject_id: str | None, *form: Any) -> list[Any]:
        workspace.subject(subject_id)  # It may have been deleted meanwhile.
        return _show(context, subject_id, form)[1:]

    def relabel(subject_id: str | None, *form: Any) -> list[Any]:
        shown = _show(context, subject_id, form)
        return [shown[outputs.index(field)] for field in (tab.gallery, tab.report)]

    def resize(subject_id: str | None, *form: Any) -> str:
        return str(relabel(subject_id, *form)[-1])

    def remove(subject_id: str, *form: Any) -> list[Any]:
        is_gone = subjects.delete_subject(workspace, subject_id)
        message = html.note("Subject deleted" + ("" if is_gone else REMAINS), "info")
        return _show(context, subject_id, form, message)

    def leave(subject_id: str | None, *form: Any) -> list[Any]:
        """Show no photos once the selected subject was deleted."""
        if subject_id == GONE:
            return _show(context, GONE, form)[1:]
        return [gr.skip()] * (len(outputs) - 1)

    # `input`, not `change`: updates from other events must not run this again.
    ui.on(tab.pick.input, select, inputs, outputs[1:])
    ui.on(tab.pick.change, leave, inputs, outputs[1:])
    *size, masked_loss = preview
    ui.on([field.change for field in size], resize, inputs, [tab.report])
    ui.on(masked_loss.change, relabel, inputs, [tab.gallery, tab.report])
    ui.on(
        tab.remove.click, remove, inputs, outputs,
        confirm=lambda subject_id, *_: subject_question(workspace, subject_id),
    )  # fmt: skip
    ui.on(restored.then, load, inputs, outputs)
    _connect_new(context, tab, preview, outputs)
    _connect_look(context, tab, inputs)
    captions.connect(context, tab.captions, tab.pick)
    photo.connect(context, tab.editing, inputs, view)


def _show(
    context: Context, subject_id: str | None, form: Sequence[Any], message: str = ""
) -> list[Any]:
    """Return all outputs for the selected subject, or for the newest if none is selected."""
    known = subjects.subjects_in(context.workspace)
    newest = None if subject_id else next(iter(known), None)
    current = next((subject for subject in known if subject.id == subject_id), newest)
    pick = ui.filled(_choices(context, subject_id))
    return [
        {**pick, "value": current.id} if current else pick,
        html.pieces.place(current),
        *photo.subject_view(current, photo.preview(context, *form), message),
    ]


def _choices(context: Context, subject_id: str | None) -> Any:
    """Return an update of the list of subjects, with the newest selected by default."""
    known = subjects.subjects_in(context.workspace)
    choices = [(f"{s.title} ({counted(len(s.photos), 'photo')})", s.id) for s in known]
    newest = known[0].id if known else None
    return ui.choosing(choices, subject_id, newest, visible=bool(choices))


def _connect_new(context: Context, tab: SubjectTab, preview: list[Any], outputs: list[Any]) -> None:
    """Connect the ways to new subjects: by name, from a sample, and by an upload."""
    workspace = context.workspace

    def create(title: str, *form: Any) -> list[Any]:
        title = clean_text(title, 60, "name")
        if not title:
            raise UserError("give the new subject a name first")
        return ["", *_show(context, subjects.new_subject(workspace, title), form)]

    def take(event: gr.EventData, *form: Any) -> list[Any]:
        subject_id = subjects.take_sample(workspace, samples_folder(), ui.clicked(event)[1])
        message = html.note("A sample subject, ready to train.", "good")
        return _show(context, subject_id, form, message)

    def upload(files: list[str] | None, subject_id: str | None, name: str, *form: Any) -> list[Any]:
        if not files:
            return [gr.skip()] * (2 + len(outputs))
        subject_id, message = _upload(workspace, files, subject_id, name)
        name_left = "" if subject_id else gr.skip()
        return [None, name_left, *_show(context, subject_id, form, message)]

    ui.on(
        tab.upload.upload, upload, [tab.upload, tab.pick, tab.name, *preview],
        [tab.upload, tab.name, *outputs], js="studio.join", show="minimal",
    )  # fmt: skip
    new = [tab.create.click, tab.name.submit]
    ui.on(new, create, [tab.name, *preview], [tab.name, *outputs])
    ui.on(tab.samples.click, take, preview, outputs, show="minimal")


def _upload(
    workspace: Workspace, files: list[str], subject_id: str | None, name: str
) -> tuple[str | None, str]:
    """Add photos to a subject or a new one. Returns its id, or None, and a message."""
    is_new = subject_id in (None, "", GONE)
    if is_new:
        titles = {subject.title for subject in subjects.subjects_in(workspace)}
        names = ["My subject", *(f"My subject {number}" for number in range(2, len(titles) + 3))]
        free = next(name for name in names if name not in titles)
        subject_id = subjects.new_subject(workspace, clean_text(name, 60, "name") or free)
    stored = subjects.read_subject(workspace, subject_id)
    result = subjects.add_photos(workspace, stored.id, files)
    if is_new and not result.accepted:
        subjects.delete_subject(workspace, stored.id)
        return None, html.notes(result.refused, "bad")
    kind = "the new subject" if is_new else "the subject"
    return stored.id, _report(result, f"{kind} {stored.title}")


def _report(result: Upload, where: str) -> str:
    """Return a message on the added files, and a line for each refused file."""
    counts = {"photo": len(result.accepted), "caption": len(result.captions)}
    added = [counted(count, noun) for noun, count in counts.items() if count]
    text = f"{' and '.join(added)} added to {where}" if added else ""
    return html.note(text, "good") + html.notes(result.refused, "bad")


def _connect_look(context: Context, tab: SubjectTab, inputs: list[Any]) -> None:
    """Connect the button that checks the photos by ``dora-diffusion prepare``."""

    def looked(subject_id: str | None) -> str:
        return str(refresh(context, context.queued(), subject_id)["looked"])

    def look(subject_id: str | None, *form: Any, model: str = "") -> str:
        subject = subjects.read_subject(context.workspace, subject_id)
        start_look(context.workspace, subject, photo.preview(context, *form).side, model)
        return looked(subject_id)

    def automatic(subject_id: str | None, model: str, *form: Any) -> str:
        name = str(model or "").strip()
        if not name:
            raise UserError("name a captioning model first: a folder, or a hub id")
        return look(subject_id, *form, model=context.allowed_model(name))

    def reread(subject_id: str | None) -> list[Any]:
        """Return the captions after a job has written some."""
        stored = subjects.read_subject(context.workspace, subject_id) if subject_id else None
        jobs = looks_at(context.jobs(), stored) if stored else []
        return captions.shown(stored) if jobs and jobs[0].has_ended else [gr.skip()] * 2

    def stop(subject_id: str | None, event: gr.EventData) -> str:
        stop_job(context.workspace.job(ui.clicked(event)[1]))
        return looked(subject_id)

    ui.on(tab.look.click, look, inputs, [tab.looked], show="minimal")
    view, (pick, *preview) = tab.captions, inputs
    named = [pick, view.model, *preview]
    ui.on(view.automatic.click, automatic, named, [tab.looked], show="minimal")
    ui.on(tab.looked.click, stop, [tab.pick], [tab.looked])
    ui.on(tab.looked.change, reread, [tab.pick], [view.tags, view.rows])


def refresh(context: Context, jobs: Sequence[Job], subject_id: str | None) -> dict[str, Any]:
    """Return the timer's update of this tab: the list of subjects, and the last check of photos."""
    pick = _choices(context, subject_id)
    try:
        subject = subjects.read_subject(context.workspace, subject_id)
    except UserError:
        return {"subject": pick, "looked": ""}
    looked = "".join(map(html.task_card, looks_at(jobs, subject)[:1]))
    return {"subject": pick, "looked": looked}


def _sample_cards(samples: Path) -> str:
    """Return the bundled samples as clickable images; empty if the app has none."""
    cards = [
        html.image_card(
            samples / name / "01.jpg", "take", name, name.replace("_", " ").capitalize()
        )
        for name in subjects.sample_names(samples)
    ]
    offer = "No photos at hand? Take a sample: the embedded model learns it in some minutes."
    return html.pieces.samples(offer, cards)
