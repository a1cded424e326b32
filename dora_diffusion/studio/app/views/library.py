"""The Library tab: what was made, and taking it away."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.cli.settings import JOBS
from dora_diffusion.config.command import AsJob, CommandSettings
from dora_diffusion.data.images import open_photo
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context, plain
from dora_diffusion.studio.app.views.fields import (
    BUSY,
    CLICKS,
    QUIET,
    changing,
    choosing,
    clicked,
    filled,
    gallery,
    html_block,
    id_dropdown,
    image_or_blank,
    setting_field,
)
from dora_diffusion.studio.app.views.tasks import task_list
from dora_diffusion.studio.jobs.checkpoints import chosen_adapter
from dora_diffusion.studio.jobs.queue import delete_job, stop_job
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.subjects import photos_in
from dora_diffusion.studio.jobs.tasks import (
    start_conversion,
    start_merge,
    start_push,
    start_task,
    targets,
    write_card,
)
from dora_diffusion.studio.jobs.workspace import REMAINS, UserError

_NOTHING = html.empty(
    "The library is empty", "A run appears here when it is done. Start one in the Train tab."
)
_THUMBNAIL = 256


class LibraryTab:
    """The tab's fields."""

    def __init__(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                html_block(html.heading("6", "Library", "Everything you have trained."))
                self.gallery = gallery(
                    columns=3, allow_preview=False, format="jpeg", elem_id="library"
                )
                self.run = id_dropdown(label="Run", elem_id="library-run")
                self.details = html_block(_NOTHING, elem_id="library-facts")
            with gr.Column(scale=5, min_width=320, visible=False) as self.side:
                self._add_export()
                self.buttons: dict[str, tuple[Any, list[Any]]] = {}
                for kind in JOBS.values():
                    if kind.job and kind.job.heading:
                        self._add_task(kind, kind.job)
                self._add_push()
                self.tasks = html_block(elem_id="tasks", js_on_load=CLICKS)
                self._add_delete()

    def _add_export(self) -> None:
        html_block(html.heading("", "Export", "An adapter for your program, or one model."))
        self.target = gr.Dropdown(
            [(title, name) for name, title in targets().items()],
            value=next(iter(targets())),
            label="Program",
            info="It gets the file that it needs of this adapter, with a line on what that costs.",
            elem_id="format",
        )
        self.convert = gr.Button("Prepare the download", variant="primary", elem_id="convert")
        self.files = html_block(elem_id="files")
        text = "Or a merged checkpoint: one file without an adapter, for web UIs."
        html_block(html.quiet(text))
        self.strength = gr.Slider(0, 2, 1, step=0.05, label="Merge strength")
        self.merge = gr.Button("Merge", size="md", elem_id="merge")

    def _add_task(self, kind: type[CommandSettings], job: AsJob) -> None:
        """A button for a kind of job, with a field for each setting that it asks for."""
        with gr.Accordion(job.heading, open=False):
            html_block(html.quiet(job.about))
            fields = [setting_field(s, s.default) for s in kind.settings() if s.name in job.asked]
            button = gr.Button(job.verb, size="md", elem_id=job.command)
        self.buttons[job.command] = button, fields

    def _add_push(self) -> None:
        with gr.Accordion("Publish on the Hugging Face hub", open=False):
            text = (
                "Adapter, model card, settings, loss and samples; never the photos. Needs HF_TOKEN "
                "in the environment that the app was started in."
            )
            html_block(html.quiet(text))
            self.repository = gr.Textbox(
                label="Repository", placeholder="your-name/my-subject", max_lines=1,
                max_length=200, elem_id="repository",
            )  # fmt: skip
            self.private = gr.Checkbox(True, label="Private: only you can see it")
            self.push = gr.Button("Publish", size="md", elem_id="push")

    def _add_delete(self) -> None:
        with gr.Accordion("Delete", open=False):
            text = (
                "Deletes the run with its adapter, checkpoints, samples, exports and copies of the "
                "photos. It cannot be restored; what a program has open goes when the app starts "
                "next."
            )
            html_block(html.quiet(text))
            self.delete = gr.Button("Delete this run", variant="stop", size="md", elem_id="delete")


def connect(context: Context, tab: LibraryTab) -> None:
    """Connect the fields to their actions."""
    workspace = context.workspace

    @plain
    def choose(event: gr.SelectData) -> Any:
        ids = [job.id for job in _listed(context.jobs())]
        return ids[event.index] if isinstance(event.index, int) and event.index < len(ids) else None

    @plain
    def show(job_id: str | None) -> list[Any]:
        return [_facts(context.job(job_id)) if job_id else _NOTHING, ""]

    @plain
    def delete(job_id: str | None) -> list[Any]:
        if not job_id:  # not confirmed
            return [gr.skip()] * 3
        context.generator.release()  # Windows deletes no model that is mapped into memory.
        text = "Deleted" + ("" if delete_job(workspace, str(job_id)) else REMAINS)
        parts = refresh(context.jobs(fresh=True), None)
        return [filled(parts["library"]), filled(parts["library_run"]), html.note(text, "info")]

    tab.gallery.select(choose, None, [tab.run], **QUIET)
    tab.run.change(show, [tab.run], [tab.details, tab.files], **QUIET)
    tab.delete.click(
        delete,
        [tab.run],
        [tab.gallery, tab.run, tab.files],
        js="(id) => confirm('Delete this run with everything it made?') ? id : ''",
        **QUIET,
    )
    _connect_tasks(context, tab)


def _connect_tasks(context: Context, tab: LibraryTab) -> None:
    """Connect the buttons that start jobs on a run."""
    workspace = context.workspace

    def task(start: Callable[..., str]) -> Callable[..., str]:
        """A button that starts a job about the run that is shown."""

        @plain
        def run(job_id: str | None, *values: Any) -> str:
            start(workspace, context.job(job_id), *values)
            context.queue.tick()
            return task_list(context.jobs(fresh=True))

        return run

    @plain
    def push(job_id: str | None, repository: str, private: bool) -> str:
        if context.launch.is_open:
            raise UserError(
                "a shared app does not publish, since that would be in the name of whoever runs "
                "it; download the adapter instead"
            )
        return task(start_push)(job_id, repository, private)

    @plain
    def card(job_id: str | None) -> str:
        return html.download(write_card(workspace, context.job(job_id)), "Model card")

    @plain
    def stop(event: gr.EventData) -> str:
        stop_job(workspace.job(clicked(event)[1]))
        return task_list(context.jobs(fresh=True))

    convert = task(start_conversion)
    tab.convert.click(convert, [tab.run, tab.target], [tab.tasks], **BUSY)
    tab.convert.click(card, [tab.run], [tab.files], **QUIET)
    tab.merge.click(task(start_merge), [tab.run, tab.strength], [tab.tasks], **BUSY)
    for command, (button, fields) in tab.buttons.items():
        start = functools.partial(start_task, command)
        button.click(task(start), [tab.run, *fields], [tab.tasks], **BUSY)
    tab.push.click(push, [tab.run, tab.repository, tab.private], [tab.tasks], **BUSY)
    tab.tasks.click(stop, None, [tab.tasks], **QUIET)


def _listed(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.can_generate and job.has_ended]


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
                    image_or_blank(functools.partial(_thumbnail, path), f"{title} · {shown_state}")
                    for _, title, shown_state, path in marks
                ],
                visible=bool(runs),
            ),
        ),
        "library_run": choosing(choices, value, chosen, visible=bool(runs)),
        "library_side": changing(visible=bool(runs)),
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
