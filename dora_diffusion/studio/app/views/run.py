"""The displayed run of the Train tab: progress, samples, checkpoints, and the queue."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from dora_diffusion.config import TrainConfig
from dora_diffusion.evaluation.ranking import Ranking
from dora_diffusion.formats.files import runs
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.settings import command_line
from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.jobs import queue, tasks
from dora_diffusion.studio.jobs.deletions import run_question
from dora_diffusion.studio.jobs.records import log_tail, log_warnings, read_metrics, read_validation
from dora_diffusion.studio.jobs.snapshot import Job, choose, read_ranking
from dora_diffusion.studio.jobs.store import GONE, REMAINS, DamagedFile, MissingError

_NOTHING = html.empty(
    "Nothing trained yet",
    "Choose a subject, say what it is, and start: progress, loss and sample images appear here.",
)
_GONE = html.empty("No run is chosen", "The run that was shown was deleted; choose another one.")
RAW, SMOOTHED = "each step", "smoothed"
_MOST_POINTS = 400
_CONTROLS = ("run", "status", "now", "stop", "kill", "resume", "remove", "extend")


class RunView:
    """Fields of a run."""

    def __init__(self) -> None:
        self.run = ui.id_dropdown(
            label="Run", show_label=False, container=False, visible=False, elem_id="run"
        )
        self.status = ui.html_block(_NOTHING, elem_id="status")
        with gr.Row():
            self.stop = ui.button("Stop and save", "stop", visible=False)
            self.kill = ui.button("Kill", visible=False, variant="stop")
            self.resume = ui.button("Resume", "resume", visible=False, variant="primary")
        with gr.Row(visible=False) as self.now:
            self.save = ui.button("Save now", "save-now")
            self.sample = ui.button("Sample now", "sample-now")
        self.message = ui.html_block(elem_id="run-said")
        with gr.Row(visible=False) as self.next:
            text = "Generate images with it"
            self.to_generate = ui.button(text, "to-generate", variant="primary")
            self.to_library = ui.button("Export it", "to-library")
        with gr.Row(visible=False, elem_classes="dd-tool-row") as self.extend:
            self.more = gr.Number(100, label="More steps", precision=0, minimum=1, elem_id="more")
            self.extend_by = ui.button("Continue with more steps", "continue")
        self.loss = ui.html_block(elem_id="loss")
        with gr.Row(elem_id="loss-plots"):
            colors = {RAW: "#9a8c8080", SMOOTHED: "#e35d2b"}  # visible in both themes
            self.training = _loss_plot("training loss", color="curve", color_map=colors)
            # A separate scale, because the training loss weights timesteps.
            self.validation = _loss_plot("validation loss")
        self.samples = ui.html_block(elem_id="samples", js_on_load="studio.flip(element, watch)")
        text = (
            "More steps raise the similarity to the subject, and language drift with it. Ranking "
            "asks every checkpoint for the same images at the same seeds and measures both."
        )
        with gr.Column(visible=False, elem_id="chooser") as self.chooser:
            ui.html_block(html.heading("", "Which checkpoint?", text))
            self.rank = ui.button("Rank the checkpoints", "rank-checkpoints")
            self.cards = ui.html_block(elem_id="checkpoints", js_on_load=ui.CLICKS)
        with gr.Column(visible=False, elem_classes="dd-details") as self.details:
            with gr.Accordion("Queue and history", open=True):
                self.jobs = ui.html_block(elem_id="jobs")
            with gr.Accordion("Log", open=False):
                self.log = ui.html_block(elem_id="log")
            with gr.Accordion("Command line of this run", open=False):
                self.command = ui.html_block(elem_id="command")
            with gr.Accordion("Rename or remove", open=False):
                limit = tasks.NAME_LIMIT
                self.name = ui.line("Name of this run", "run-name", max_length=limit)
                with gr.Row():
                    self.rename = ui.button("Rename", "rename")
                    self.remove = ui.button("Remove this run", "remove", visible=False)


def _loss_plot(title: str, **options: Any) -> Any:
    size: dict[str, Any] = {"height": 240, "min_width": 260}
    return gr.LinePlot(
        x="step", y="loss", y_title=title, color_title=" ", visible=False, **size, **options
    )


def connect(context: Context, view: RunView) -> None:
    """Connect the actions on the displayed run."""
    workspace = context.workspace

    def remove(folder: Path) -> str:
        return "" if queue.delete_job(workspace, folder.name) else REMAINS

    def rename(job_id: str | None, name: str) -> list[Any]:
        act = _act(context, lambda folder: tasks.rename_run(workspace, folder.name, name))
        return [*act(job_id), gr.update(value="", placeholder=name)]

    def command(job_id: str | None) -> list[str]:
        if not job_id or job_id == GONE:
            nothing = html.empty("No run yet", "Its command line appears here.")
            return [nothing, gr.skip(), gr.skip()]
        job = context.job(job_id)
        name = gr.update(placeholder=job.title)
        return [_commands(job), "", name]

    def draw(job_id: str | None) -> list[Any]:
        """Return updates of the plots of training and validation loss."""
        try:
            training, validation = _losses(workspace.job(job_id))
        except MissingError:  # none is chosen, or it was deleted just now
            return [gr.update(visible=False)] * 2
        held_out = [(step, loss, "") for step, loss in validation.items()]
        curves = [training_curves(training), held_out]
        return [gr.update(value=plot_data(rows), visible=bool(rows)) for rows in curves]

    outputs = [view.message, *(getattr(view, name) for name in _CONTROLS)]
    # Stopping and resuming need no message: the card shows the state.
    ui.on(view.stop.click, _act(context, queue.stop_job), [view.run], outputs)
    ui.on(view.resume.click, _act(context, queue.requeue_job), [view.run], outputs)
    ui.on(view.kill.click, _act(context, queue.kill_job, "The run was killed"), [view.run], outputs)
    for button, name in ((view.save, runs.SAVE), (view.sample, runs.SAMPLE)):
        asking = _act(context, functools.partial(queue.ask_job, name=name))
        ui.on(button.click, asking, [view.run], outputs)
    ui.on(view.extend_by.click, _act(context, tasks.continue_run), [view.run, view.more], outputs)
    question = functools.partial(run_question, workspace)
    removed = _act(context, remove, "The run was removed")
    ui.on(view.remove.click, removed, [view.run], outputs, confirm=question)
    named = [view.rename.click, view.name.submit]
    ui.on(named, rename, [view.run, view.name], [*outputs, view.name])
    ui.on(view.run.change, command, [view.run], [view.command, view.message, view.name])
    ui.on([view.loss.change, view.run.change], draw, [view.run], [view.training, view.validation])
    _connect_chooser(context, view)


def _commands(job: Job) -> str:
    """Return a job's command line; for training, also the same command with all flags."""
    text = html.command(job.record.command, "What runs")
    with contextlib.suppress(ValueError):  # settings of another version
        if job.kind == "train" and job.settings:
            line = command_line(TrainConfig.from_dict(job.settings))
            text += html.command(line, "The same with every setting that is not a default")
    return text


def _act(
    context: Context, action: Callable[..., str | None], text: str = ""
) -> Callable[..., list[Any]]:
    """Return the handler of a button on the displayed run, with its message."""

    def run(job_id: str | None, *values: Any) -> list[Any]:
        message = text + (action(context.workspace.job(job_id), *values) or "")
        jobs = context.queued()
        gone = {job.id for job in jobs if _never_began(job)}
        updates = refresh(context, jobs, None if job_id in gone else job_id)
        return [html.note(message, "info"), *(ui.filled(updates[name]) for name in _CONTROLS)]

    return run


def run_choices(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Return the choices of runs, with title, time and state."""
    return [(f"{job.label} · {job.shown_state}", job.id) for job in _runs(jobs)]


def _runs(jobs: Sequence[Job]) -> list[Job]:
    """Return training runs and damaged jobs, which can be inspected and removed here."""
    return [job for job in jobs if job.kind == "train" or job.shown_state == "damaged"]


def refresh(context: Context, jobs: Sequence[Job], run: str | None) -> dict[str, Any]:
    """Return the timer's update of this view: field name -> value or (mark, factory)."""
    training = _runs(jobs)
    active = next((job for job in training if job.is_active), None)
    begun = next((job for job in training if not _never_began(job)), None)
    default = active or begun or next(iter(training), None)
    job = next((job for job in training if job.id == run), None) if run else default
    waits = bool(job and job.state == "waiting")
    choices = run_choices(jobs)
    is_training = bool(job and job.state == "running" and job.progress.phase == "training")
    return {
        "run": ui.choosing(choices, run, default and default.id, visible=bool(choices)),
        "status": html.status_card(job) if job else _GONE if training else _NOTHING,
        "loss": loss_text(job.id, *_losses(job.folder)) if job else "",
        "log": html.log_view(log_tail(job.folder)) if job else "",
        "jobs": html.queue_list(jobs),
        "samples": _flip(job.samples, context.workspace.cache) if job else "",
        "now": ui.changing(visible=is_training),
        "stop": ui.changing(
            value="Remove from queue" if waits else "Stop and save",
            visible=waits or bool(job and job.state == "running"),
        ),
        "kill": ui.changing(visible=bool(job and job.may_kill)),
        "resume": ui.changing(visible=bool(job and job.state in ("stopped", "failed", "crashed"))),
        "remove": ui.changing(visible=bool(job and job.has_ended)),
        "next": ui.changing(visible=bool(job and job.has_ended and job.stands)),
        "extend": ui.changing(visible=bool(job and tasks.can_continue(job))),
        "details": ui.changing(visible=bool(jobs)),
        **_refresh_chooser(context, jobs, job),
    }


def _losses(folder: Path) -> tuple[Sequence[Mapping[str, Any]], Mapping[int, float]]:
    """Return the records of a run's steps, and its validation losses by step."""
    return read_metrics(folder), read_validation(folder)


def _never_began(job: Job) -> bool:
    """Return whether a run left the queue, or was stopped, before its first step."""
    return job.state == "stopped" and not job.step


def _flip(samples: Sequence[Path], cache: Path) -> str:
    """Return a slider over sample images, from the base model to the result.

    Args:
        samples: Sheets of the same prompts and seeds.
        cache: Gradio's folder; the server does not serve the runs' folders.
    """
    order = {"base": -1, "adapted": 1}
    sheets = sorted(samples, key=lambda path: (order.get(path.stem, 0), path.stem))
    if not sheets:
        return ""
    return html.pieces.flip(
        [(html.address(_given_out(path, cache)), _sample_title(path.stem)) for path in sheets]
    )


def _given_out(path: Path, cache: Path) -> Path:
    """Return a copy of an image in a folder that the server serves."""
    stamp = path.stat().st_mtime_ns
    copy = _copied(path, stamp, cache)
    if not copy.exists():  # Gradio deletes its files after a day.
        _copied.cache_clear()
        copy = _copied(path, stamp, cache)
    return copy


@functools.lru_cache(maxsize=1024)
def _copied(path: Path, modified: int, cache: Path) -> Path:
    return Path(save_file_to_cache(path, str(cache)))


def _sample_title(name: str) -> str:
    if name.startswith("step-") and name[5:].isdecimal():
        return f"step {int(name.removeprefix('step-'))}"
    return {"adapted": "the result", "base": "the base model"}.get(name, name)


def _connect_chooser(context: Context, view: RunView) -> None:
    """Connect the ranking of the displayed run's checkpoints, and the choice of one."""

    def now(job_id: str) -> list[Any]:
        updates = _refresh_chooser(context, context.queued(), context.job(job_id))
        return list(map(ui.filled, updates.values()))

    def start(job_id: str | None) -> list[Any]:
        job = context.job(job_id)
        running = _ranking_of(context.jobs(fresh=True), job)
        if running is None or running.has_ended:
            tasks.start_ranking(context.workspace, job)
        return now(job.id)

    def click(job_id: str | None, event: gr.EventData) -> list[Any]:
        job = context.job(job_id)
        action, value = ui.clicked(event)
        if action == "stop":
            queue.stop_job(context.workspace.job(value))
        else:
            where = "is now used for this run in Generate and in the Library."
            gr.Info(f"Step {choose(job, value)} {where}", title="")
        return now(job.id)

    outputs = [view.chooser, view.rank, view.cards]
    ui.on(view.rank.click, start, [view.run], outputs)
    ui.on(view.cards.click, click, [view.run], outputs)


def _ranking_of(jobs: Sequence[Job], run: Job | None) -> Job | None:
    """Return the newest job that ranks a run's checkpoints, or None."""
    rankings = (job for job in jobs if job.kind == "rank-checkpoints" and run)
    return next((job for job in rankings if run and job.record.run == run.id), None)


def _refresh_chooser(context: Context, jobs: Sequence[Job], job: Job | None) -> dict[str, Any]:
    """Return the timer's update of the checkpoint chooser: visibility, button and cards."""
    is_visible = bool(job and job.has_ended and job.candidates)
    running = _ranking_of(jobs, job)
    busy = running is not None and not running.has_ended
    ranking, damage = None, ""
    if job and is_visible:
        try:
            ranking = read_ranking(context.workspace, job)
        except DamagedFile as error:
            damage = html.note(f"{error}, or rank again", "bad")
    label = "Rank again" if ranking else "Rank the checkpoints"
    return {
        "chooser": ui.changing(visible=is_visible),
        "chooser_start": ui.changing(value=label, visible=not busy),
        "chooser_cards": damage + _cards(job, ranking, running) if job and is_visible else "",
    }


def _cards(job: Job, ranking: Ranking | None, running: Job | None) -> str:
    status = ""
    if running is not None and not running.has_ended:
        status = html.status_card(running, stop=True)
    elif running is not None:
        failed = f"The ranking failed: {running.cause}" if running.cause else ""
        status = html.note(failed, "bad") + html.notes(log_warnings(running.folder), "warn")
    return status if ranking is None else html.pieces.ranking(status, job, ranking)


def smoothed(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Return the exponential moving average with bias correction, as in Adam."""
    mean, result = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = keep * mean + (1 - keep) * value
        result.append(mean / (1 - keep**count))
    return result


def loss_text(
    run: str, records: Sequence[Mapping[str, Any]], validation: Mapping[int, float]
) -> str:
    """Return the last smoothed loss and the lowest validation loss of a run.

    The text differs between runs and after each step, so that the page redraws the plots.
    """
    if len(records) < 2:
        return html.empty("No loss yet", "The curve appears with the first steps.")
    loss = smoothed([float(record["loss"]) for record in records])[-1]
    best = min((step for step in validation if step), key=validation.__getitem__, default=0)
    return html.pieces.losses(f"{run}-{len(records)}", loss, validation, best)


def training_curves(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, str]]:
    """Return the raw and smoothed loss over steps, as rows of step, loss and curve."""
    raw = [float(record["loss"]) for record in records]
    if len(raw) < 2:
        return []
    ordered, smooth = sorted(raw), smoothed(raw)
    # A few outliers (large noise levels) would flatten the rest.
    most = max(ordered[int(0.98 * (len(ordered) - 1))], max(smooth))
    every = slice(None, None, -(-len(raw) // _MOST_POINTS))
    steps = [int(record["step"]) for record in records]
    return [
        (step, min(loss, most), name)
        for name, losses in ((RAW, raw), (SMOOTHED, smooth))
        for step, loss in zip(steps[every], losses[every], strict=True)
    ]


def plot_data(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return rows of step, loss and curve in the format of `gradio.LinePlot`."""
    types = {"step": "quantitative", "loss": "quantitative", "curve": "nominal"}
    return {"columns": [*types], "data": [*map(list, rows)], "datatypes": types, "mark": "line"}
