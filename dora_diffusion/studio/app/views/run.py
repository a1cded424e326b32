"""The run that is shown in the Train tab: how it goes, its samples, its checkpoints, the queue."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.data.images import open_photo
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context, plain
from dora_diffusion.studio.app.plot import loss_plot
from dora_diffusion.studio.app.views import chooser
from dora_diffusion.studio.app.views.fields import (
    QUIET,
    changing,
    choosing,
    filled,
    gallery,
    html_block,
    id_dropdown,
    image_or_blank,
)
from dora_diffusion.studio.jobs.logs import log_tail, read_metrics, read_validation
from dora_diffusion.studio.jobs.queue import delete_job, kill_job, requeue_job, stop_job
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.tasks import NAME_LIMIT, can_continue, continue_run, rename_run
from dora_diffusion.studio.jobs.workspace import REMAINS

_NOTHING = html.empty(
    "Nothing trained yet",
    "Choose a subject, say what it is, and start: progress, loss and sample images appear here.",
)
_CONTROLS = ("run", "status", "stop", "kill", "resume", "remove", "extend")


class RunView:
    """The fields of a run."""

    def __init__(self) -> None:
        self.run = id_dropdown(
            label="Run", show_label=False, container=False, visible=False, elem_id="run"
        )
        self.status = html_block(_NOTHING, elem_id="status")
        with gr.Row():
            self.stop = gr.Button("Stop and save", visible=False, size="md", elem_id="stop")
            self.kill = gr.Button("Kill", visible=False, size="md", variant="stop")
            self.resume = gr.Button(
                "Resume", visible=False, size="md", variant="primary", elem_id="resume"
            )
        self.message = html_block(elem_id="run-said")
        with gr.Row(visible=False) as self.next:
            self.to_generate = gr.Button(
                "Generate images with it", size="md", variant="primary", elem_id="to-generate"
            )
            self.to_library = gr.Button("Export it", size="md", elem_id="to-library")
        with gr.Row(visible=False, equal_height=True) as self.extend:
            self.more = gr.Number(100, label="More steps", precision=0, minimum=1, elem_id="more")
            self.extend_by = gr.Button("Continue with more steps", size="md", elem_id="continue")
        self.loss = html_block(elem_id="loss")
        self.samples = gallery(
            columns=2, buttons=["fullscreen"], visible=False, format="png", elem_id="samples"
        )
        self.chooser = chooser.ChooserView()
        with gr.Column(visible=False, elem_classes="dd-details") as self.details:
            with gr.Accordion("Queue and history", open=True):
                self.jobs = html_block(elem_id="jobs")
            with gr.Accordion("Log", open=False):
                self.log = html_block(elem_id="log")
            with gr.Accordion("Command line of this run", open=False):
                self.command = html_block(elem_id="command")
            with gr.Accordion("Rename or remove", open=False):
                self.name = gr.Textbox(
                    label="Name of this run", max_lines=1, max_length=NAME_LIMIT, elem_id="run-name"
                )
                with gr.Row():
                    self.rename = gr.Button("Rename", size="md", elem_id="rename")
                    self.remove = gr.Button(
                        "Remove this run", visible=False, size="md", elem_id="remove"
                    )


def connect(context: Context, view: RunView) -> None:
    """Stop, kill, resume and remove the run that is shown."""
    workspace, act = context.workspace, functools.partial(_act, context)

    def resume(folder: Path) -> None:
        requeue_job(folder)
        context.queue.tick()

    def remove(folder: Path) -> str:
        return "" if delete_job(workspace, folder.name) else REMAINS

    @plain
    def extend(job_id: str | None, more: float) -> list[Any]:
        def queue(folder: Path) -> None:
            continue_run(folder, more)
            context.queue.tick()

        return act(queue)(job_id)

    @plain
    def rename(job_id: str | None, name: str) -> list[Any]:
        shown = act(lambda folder: rename_run(workspace, folder.name, name))(job_id)
        return [*shown, gr.update(value="", placeholder=name)]

    @plain
    def command(job_id: str | None) -> list[str]:
        if not job_id:
            return [
                html.empty("No run yet", "Its command line appears here."),
                gr.skip(),
                gr.skip(),
            ]
        job = context.job(job_id)
        called = gr.update(placeholder=job.title)
        return [html.command(job.record.command, "What runs"), "", called]

    outputs = [view.message, *(getattr(view, name) for name in _CONTROLS)]
    # Of stopping and resuming the card tells, as long as it is true.
    view.stop.click(act(stop_job), [view.run], outputs, **QUIET)
    view.resume.click(act(resume), [view.run], outputs, **QUIET)
    view.kill.click(act(kill_job, "The run was killed"), [view.run], outputs, **QUIET)
    view.remove.click(
        act(remove, "The run was removed"),
        [view.run],
        outputs,
        js="(id) => confirm('Remove this run with everything it made?') ? id : ''",
        **QUIET,
    )
    view.extend_by.click(extend, [view.run, view.more], outputs, **QUIET)
    gr.on(
        [view.rename.click, view.name.submit], rename, [view.run, view.name],
        [*outputs, view.name], **QUIET,
    )  # fmt: skip
    view.run.change(command, [view.run], [view.command, view.message, view.name], **QUIET)
    chooser.connect(context, view.chooser, view.run)


def _act(
    context: Context, action: Callable[[Path], str | None], text: str = ""
) -> Callable[[str | None], list[Any]]:
    """Return the action of a button on the run that is shown, with its message."""

    @plain
    def run(job_id: str | None) -> list[Any]:
        if not job_id:  # not confirmed
            return [gr.skip()] * (1 + len(_CONTROLS))
        told = text + (action(context.workspace.job(job_id)) or "")
        jobs = context.jobs(fresh=True)
        gone = {job.id for job in jobs if _never_began(job)}
        parts = refresh(context, jobs, None if job_id in gone else job_id)
        return [html.note(told, "info"), *(filled(parts[name]) for name in _CONTROLS)]

    return run


def run_choices(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Runs by title, time and state."""
    return [(f"{job.label} · {job.shown_state}", job.id) for job in _runs(jobs)]


def _runs(jobs: Sequence[Job]) -> list[Job]:
    """Training runs, and what else is damaged, so that it can be looked at and removed."""
    return [job for job in jobs if job.kind == "train" or job.shown_state == "damaged"]


def refresh(context: Context, jobs: Sequence[Job], run: str | None) -> dict[str, Any]:
    """Return the timer's update of this view: field name -> value, or (mark, how to make it)."""
    training = _runs(jobs)
    active = next((job for job in training if job.is_active), None)
    job = next((job for job in training if job.id == run), None)
    begun = next((job for job in training if not _never_began(job)), None)
    job = job or active or begun or next(iter(training), None)
    waits = bool(job and job.state == "waiting")
    choices = run_choices(jobs)
    value = job.id if job else None

    samples = job.samples if job else ()
    stamps = tuple((str(path), path.stat().st_mtime_ns) for path in samples)
    return {
        "run": choosing(choices, value, run, visible=bool(choices)),
        "status": html.status_card(job) if job else _NOTHING,
        "loss": loss_plot(read_metrics(job.folder), read_validation(job.folder)) if job else "",
        "log": html.log_view(log_tail(job.folder)) if job else "",
        "jobs": html.queue_list(jobs),
        "samples": (stamps, lambda: _sample_gallery(samples)),
        "stop": changing(
            value="Remove from queue" if waits else "Stop and save",
            visible=waits or bool(job and job.state == "running"),
        ),
        "kill": changing(visible=bool(job and job.may_kill)),
        "resume": changing(visible=bool(job and job.state in ("stopped", "failed", "crashed"))),
        "remove": changing(visible=bool(job and job.has_ended)),
        "next": changing(visible=bool(job and job.has_ended and job.can_generate)),
        "extend": changing(visible=bool(job and can_continue(job))),
        "details": changing(visible=bool(jobs)),
        **chooser.refresh(context, jobs, job),
    }


def _never_began(job: Job) -> bool:
    """Return whether a run left the queue, or was stopped, before its first step."""
    return job.state == "stopped" and not job.step


def _sample_gallery(samples: Sequence[Path]) -> Any:
    images = [
        image_or_blank(functools.partial(open_photo, path, limited=False), _sample_title(path.stem))
        for path in samples[:9]
    ]
    return gr.update(value=images, visible=bool(images))


def _sample_title(name: str) -> str:
    if name.startswith("step-") and name[5:].isdecimal():
        return f"step {int(name.removeprefix('step-'))}"
    return {"adapted": "with the adapter", "base": "without it, same seeds"}.get(name, name)
