"""The Library tab: what was made, and taking it away."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config.command import AsJob, CommandSettings
from dora_diffusion.data.images import open_photo
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.html import task_list
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.jobs import tasks
from dora_diffusion.studio.jobs.queue import delete_job, stop_job
from dora_diffusion.studio.jobs.records import JOBS
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter
from dora_diffusion.studio.jobs.store import REMAINS, UserError
from dora_diffusion.studio.jobs.subjects import photos_in

_NOTHING = html.empty(
    "The library is empty", "A run appears here when it is done. Start one in the Train tab."
)
_THUMBNAIL = 256


class LibraryTab:
    """The tab's fields."""

    def __init__(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                ui.html_block(html.heading("6", "Library", "Everything you have trained."))
                self.gallery = ui.gallery(
                    columns=3, allow_preview=False, format="jpeg", elem_id="library"
                )
                self.run = ui.id_dropdown(label="Run", elem_id="library-run")
                self.details = ui.html_block(_NOTHING, elem_id="library-facts")
            with gr.Column(scale=5, min_width=320, visible=False) as self.side:
                self._add_export()
                self.buttons: dict[str, tuple[Any, list[Any]]] = {}
                for kind in JOBS.values():
                    if kind.job and kind.job.heading:
                        self._add_task(kind, kind.job)
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
        self.convert = ui.button("Prepare the download", "convert", variant="primary", size="lg")
        self.files = ui.html_block(elem_id="files")

    def _add_task(self, kind: type[CommandSettings], job: AsJob) -> None:
        """A button for a kind of job, with a field for each setting that it asks for."""
        with gr.Accordion(job.heading, open=False):
            ui.html_block(html.quiet(job.about))
            asked = [setting for setting in kind.settings() if setting.name in job.asked]
            labels = [setting.name.replace("_", " ").capitalize() for setting in asked]
            fields = [
                ui.setting_field(setting, setting.default, label)
                for setting, label in zip(asked, labels, strict=True)
            ]
            button = ui.button(job.verb, job.command)
        self.buttons[job.command] = button, fields

    def _add_delete(self) -> None:
        with gr.Accordion("Delete", open=False):
            text = (
                "Deletes the run with its adapter, checkpoints, samples, exports and copies of the "
                "photos. It cannot be restored; what a program has open goes when the app starts "
                "next."
            )
            ui.html_block(html.quiet(text))
            self.delete = ui.button("Delete this run", "delete", variant="stop")


def connect(context: Context, tab: LibraryTab) -> None:
    """Connect the fields to their actions."""
    workspace = context.workspace

    def choose(event: gr.SelectData) -> Any:
        ids = [job.id for job in _listed(context.jobs())]
        return ids[event.index] if isinstance(event.index, int) and event.index < len(ids) else None

    def show(job_id: str | None) -> list[Any]:
        return [_facts(context.job(job_id)) if job_id else _NOTHING, ""]

    def delete(job_id: str) -> list[Any]:
        context.generator.release()  # Windows deletes no model that is mapped into memory.
        text = "Deleted" + ("" if delete_job(workspace, job_id) else REMAINS)
        parts = refresh(context.jobs(fresh=True), None)
        shown = [ui.filled(parts[name]) for name in ("library", "library_run")]
        return [*shown, html.note(text, "info")]

    def task(command: str) -> Callable[..., str]:
        """A button that starts a job about the run that is shown."""

        def run(job_id: str | None, *values: Any) -> str:
            if command == "push" and context.launch.is_open:
                raise UserError(
                    "a shared app does not publish, since that would be in the name of whoever "
                    "runs it; download the adapter instead"
                )
            if command == "convert":
                tasks.start_conversion(workspace, context.job(job_id), *values)
            else:
                tasks.start_task(command, workspace, context.job(job_id), *values)
            return html.task_list(context.queued())

        return run

    def card(job_id: str | None) -> str:
        return html.download(tasks.write_card(workspace, context.job(job_id)), "Model card")

    def stop(event: gr.EventData) -> str:
        stop_job(workspace.job(ui.clicked(event)[1]))
        return html.task_list(context.jobs(fresh=True))

    ui.on(tab.gallery.select, choose, None, [tab.run])
    ui.on(tab.run.change, show, [tab.run], [tab.details, tab.files])
    question = "Delete this run with everything it made?"
    ui.on(tab.delete.click, delete, [tab.run], [tab.gallery, tab.run, tab.files], confirm=question)
    ui.on(tab.convert.click, card, [tab.run], [tab.files])
    buttons = {"convert": (tab.convert, [tab.target]), **tab.buttons}
    for command, (button, fields) in buttons.items():
        ui.on(button.click, task(command), [tab.run, *fields], [tab.tasks], show="minimal")
    ui.on(tab.tasks.click, stop, None, [tab.tasks])


def _listed(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.stands and job.has_ended]


def refresh(jobs: Sequence[Job], chosen: str | None) -> dict[str, Any]:
    """Return the timer's update of this tab."""
    runs = _listed(jobs)
    marks = tuple((job.id, job.title, job.shown_state, _image(job)) for job in runs)
    ids = [job.id for job in runs]
    value = chosen if chosen in ids else next(iter(ids), None)
    choices = [(f"{job.label} · {job.shown_state}", job.id) for job in runs]
    return {
        "library": (
            marks,
            lambda: gr.update(
                value=[
                    ui.image_or_blank(f"{title} · {shown_state}", _thumbnail, path)
                    for _, title, shown_state, path in marks
                ],
                visible=bool(runs),
            ),
        ),
        "library_run": ui.choosing(choices, value, chosen, visible=bool(runs)),
        "library_side": ui.changing(visible=bool(runs)),
        "tasks": task_list(jobs),
    }


def _image(job: Job) -> Path | None:
    """A sample, else a photo: every run has photos."""
    if job.samples:
        return job.samples[0]
    try:
        return next(iter(photos_in(job.folder / "photos")), None)
    except OSError:
        return None


@functools.lru_cache(maxsize=256)
def _thumbnail(path: Path | None) -> Any:
    """A photo's upper square, or one image of a sheet, whose text says how large they are."""
    from dora_diffusion.data.sheets import one_image
    from dora_diffusion.sampling.images import parse_parameters, read_parameters

    if path is None:
        raise ValueError("there is no image of it")
    image = open_photo(path, limited=False)
    text = read_parameters(path) if path.suffix == ".png" else None
    fields = parse_parameters(text) if text else {}
    size = fields.get("Last size", fields.get("Size", "")).split("x")
    if len(size) == 2 and all(side.isdecimal() for side in size):
        image = one_image(image, int(size[0]), int(size[1]))
    side = min(image.size)
    return image.crop((0, 0, side, side)).resize((_THUMBNAIL, _THUMBNAIL))


def _facts(job: Job) -> str:
    """Return the facts about a run's result, by its adapter file."""
    from dora_diffusion.export import inspect_adapter

    report = inspect_adapter(chosen_adapter(job))
    details = {
        "trigger words": job.trigger,
        "base model": job.base,
        "method": f"{report.method}, rank {report.rank}, norm on the {report.norm_axis} axis",
        "layers": ", ".join(f"{count} {name}" for name, count in report.layers.items()),
        "steps": f"{job.step_of(job.stands)} of {job.total}",
        "size": f"{report.nbytes / 2**20:.1f} MB",
        "made": job.made,
    }
    return (
        f"<div class='dd-card'><div class='dd-row'><h3>{html.esc(job.title)}</h3>"
        f"{html.state_pill(job)}</div><p></p>{html.definitions(details)}"
        f"{html.notes(report.notes, 'info')}</div>"
    )
