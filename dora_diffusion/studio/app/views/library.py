"""The Library tab: adapters, their export, and jobs that process them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.cli.commands.adapters import where_it_works
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.wording import counted
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import photos_in
from dora_diffusion.formats.adapter.inspect import numbers
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.views import results, ui
from dora_diffusion.studio.jobs import tasks
from dora_diffusion.studio.jobs.deletions import run_question
from dora_diffusion.studio.jobs.image_store import kept_thumbnail
from dora_diffusion.studio.jobs.queue import delete_job, stop_job
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter
from dora_diffusion.studio.jobs.store import REMAINS, MissingError

_NOTHING = html.empty(
    "The library is empty", "A run appears here when it is done. Start one in the Train tab."
)
_GONE = html.empty("No run is chosen", "The run that was chosen was deleted; choose another one.")
_THUMBNAIL = 256
_RUN = "Run"


class LibraryTab:
    """Fields of the tab."""

    def __init__(self, context: Context) -> None:
        def list_page(query: Any) -> dict[str, Any]:
            return page_of(context, query)

        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                ui.html_block(html.heading("6", "Library", "Everything you have trained."))
                self.gallery = ui.html_block(
                    elem_id="library", js_on_load=results.GALLERY, server_functions=[list_page]
                )
                self.run = ui.id_dropdown(label=_RUN, elem_id="library-run")
                self.details = ui.html_block(_NOTHING, elem_id="library-facts")
            with gr.Column(scale=5, min_width=320, visible=False) as self.side:
                self._add_export()
                self.tasks = ui.html_block(elem_id="tasks", js_on_load=ui.CLICKS)
                self._add_delete()

    def _add_export(self) -> None:
        ui.html_block(html.heading("", "Export", "An adapter for your program, or one model."))
        self.target = gr.Dropdown(
            [(title, name) for name, title in tasks.targets().items()],
            value=next(iter(tasks.targets())),
            label="Program",
            info="It gets the file that it needs of this adapter, with a line on what that costs.",
            elem_id="format",
        )
        self.strength = _strength(tasks.ConvertSettings, "Strength of the file")
        self.convert = ui.button("Prepare the download", "convert", variant="primary", size="lg")
        self.files = ui.html_block(elem_id="files")

        with gr.Accordion("One file without an adapter", open=False):
            ui.html_block(html.quiet("A merged checkpoint, for web UIs."))
            self.merged_strength = _strength(tasks.ExportSettings, "Strength")
            self.merge = ui.button("Merge", "export")

    def _add_delete(self) -> None:
        with gr.Accordion("Delete", open=False):
            text = (
                "Deletes the run with its adapter, checkpoints, samples, exports and copies of the "
                "photos. It cannot be restored. Files that a program has open are deleted at the "
                "next start of the app."
            )
            ui.html_block(html.quiet(text))
            self.delete = ui.button("Delete this run", "delete", variant="stop")


def _strength(kind: type[CommandSettings], label: str) -> Any:
    setting = tasks.strength_setting(kind)
    return ui.setting_field(setting, setting.default, label)


def connect(context: Context, tab: LibraryTab) -> None:
    """Connect the fields to their actions."""
    workspace = context.workspace

    def choose(event: gr.EventData) -> Any:
        _, job_id = ui.clicked(event)
        return job_id if job_id in {job.id for job in _listed(context.jobs())} else gr.skip()

    def show(job_id: str | None) -> str:
        if not job_id:
            return _NOTHING
        try:
            return _facts(context.job(job_id))
        except MissingError:
            return _GONE

    def delete(job_id: str) -> list[Any]:
        context.generator.release()  # Windows deletes no model that is mapped into memory.
        text = "Deleted" + ("" if delete_job(workspace, job_id) else REMAINS)
        updates = refresh(context.jobs(fresh=True), job_id)
        lists = [ui.filled(updates[name]) for name in ("library", "library_run")]
        return [*lists, html.note(text, "info")]

    def convert(job_id: str | None, target: str, strength: str) -> str:
        tasks.start_conversion(workspace, context.job(job_id, _RUN), target, strength)
        return html.task_list(context.queued(), job_id)

    def merge(job_id: str | None, strength: str) -> str:
        tasks.start_merge(workspace, context.job(job_id, _RUN), strength)
        return html.task_list(context.queued(), job_id)

    def card(job_id: str | None) -> str:
        return html.download(tasks.write_card(workspace, context.job(job_id, _RUN)), "Model card")

    def stop(run_id: str | None, event: gr.EventData) -> str:
        stop_job(workspace.job(ui.clicked(event)[1]))
        return html.task_list(context.jobs(fresh=True), run_id)

    ui.on(tab.gallery.click, choose, None, [tab.run])
    ui.on([tab.gallery.change, tab.run.change], show, [tab.run], [tab.details])
    ui.on(tab.run.change, lambda: "", None, [tab.files])
    question = functools.partial(run_question, workspace)
    ui.on(tab.delete.click, delete, [tab.run], [tab.gallery, tab.run, tab.files], confirm=question)
    ui.on(tab.convert.click, card, [tab.run], [tab.files])
    of_file = [tab.run, tab.target, tab.strength]
    ui.on(tab.convert.click, convert, of_file, [tab.tasks], show="minimal")
    ui.on(tab.merge.click, merge, [tab.run, tab.merged_strength], [tab.tasks], show="minimal")
    ui.on(tab.tasks.click, stop, [tab.run], [tab.tasks])


def _listed(jobs: Sequence[Job]) -> list[Job]:
    """Return the runs with an adapter, resumed runs included."""
    return [job for job in jobs if job.stands]


def refresh(jobs: Sequence[Job], run_id: str | None) -> dict[str, Any]:
    """Return the timer's update of this tab."""
    runs = _listed(jobs)
    # A new stamp makes the page request the cards (gallery.js) and the facts again.
    shown = [(job.id, _card_text(job), job.stands, job.total) for job in runs]
    stamp = zlib.crc32(repr(shown).encode())
    count = html.pieces.count(counted(len(runs), "run"), stamp)
    value = run_id or next((job.id for job in runs), None)
    choices = [(f"{job.label} · {job.shown_state}", job.id) for job in runs]
    return {
        "library": count if runs else "",
        "library_run": ui.choosing(choices, run_id, value, visible=bool(runs)),
        "library_side": ui.changing(visible=bool(runs)),
        "tasks": html.task_list(jobs, value),
    }


def page_of(context: Context, query: object) -> dict[str, Any]:
    """Return a page of runs as cards; query and result are as in `results.page_of`."""
    runs = _listed(context.jobs())
    listed = runs[results.asked_for(query)]
    cards = []
    for job in listed:
        source = _image(job)
        path = context.workspace.thumbnails / f"{job.id}.jpg"
        small = kept_thumbnail(source, path, _thumbnail) if source else None
        reason = "damaged" if source else "no image"
        cards.append(html.image_card(small, "show", job.id, _card_text(job), reason))
    return {"cards": "".join(cards), "count": len(listed), "total": len(runs)}


def _card_text(job: Job) -> str:
    return f"{job.title} · {job.shown_state}"


def _image(job: Job) -> Path | None:
    """Return a sample image of a run, else one of its photos, or None."""
    if job.samples:
        return job.samples[0]
    try:
        return next(iter(photos_in(job.folder / "photos")), None)
    except OSError:
        return None


def _thumbnail(path: Path) -> Any:
    """Return the top square of a photo, or of one image of a sheet (sizes are in its text)."""
    from dora_diffusion.data.sheets import one_image
    from dora_diffusion.sampling.images import parse_parameters, read_parameters

    image = open_photo(path, limited=False)
    text = read_parameters(path) if path.suffix == ".png" else None
    fields = parse_parameters(text) if text else {}
    size = fields.get("Last size", fields.get("Size", "")).split("x")
    if len(size) == 2 and all(side.isdecimal() for side in size):
        image = one_image(image, int(size[0]), int(size[1]))
    side = min(image.size)
    return image.crop((0, 0, side, side)).resize((_THUMBNAIL, _THUMBNAIL))


def _range(text: str) -> str:
    """Return a figure that is equal in all layers, or its range over layers."""
    values = numbers(text)
    if not isinstance(values, dict) or not values:
        return text
    least, most = min(values.values()), max(values.values())
    return f"{least:g} to {most:g}, by layer"


def _facts(job: Job) -> str:
    """Return the facts about a run's adapter file."""
    from dora_diffusion.export import inspect_adapter
    from dora_diffusion.sampling.images import adapter_name

    adapter = chosen_adapter(job)
    report = inspect_adapter(adapter)
    exact, wrong = where_it_works(report.tools)
    return html.pieces.adapter_card(
        job, html.state_pill(job), adapter_name(adapter), report, rank=_range(report.rank),
        alpha=_range(report.alpha),
        programs="; ".join([*exact, *([f"wrong in {wrong}"] if wrong else [])]),
    )  # fmt: skip
