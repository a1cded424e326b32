"""The checkpoint chooser under a run: fixed-seed images, similarity, drift, and "use this"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from dora_diffusion.evaluation.ranking import RankedCheckpoint, Ranking
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context, plain
from dora_diffusion.studio.app.views.fields import (
    CLICKS,
    QUIET,
    changing,
    clicked,
    filled,
    html_block,
)
from dora_diffusion.studio.jobs.checkpoints import choose, read_ranking
from dora_diffusion.studio.jobs.logs import log_warnings
from dora_diffusion.studio.jobs.queue import stop_job
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.tasks import start_ranking
from dora_diffusion.studio.jobs.workspace import DamagedFile

_WHY = (
    "More steps raise the similarity to the subject, and language drift with it. Ranking asks "
    "every checkpoint for the same images at the same seeds and measures both."
)


class ChooserView:
    """The fields of the chooser."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="chooser") as self.box:
            html_block(html.heading("", "Which checkpoint?", _WHY))
            self.start = gr.Button("Rank the checkpoints", size="md", elem_id="rank-checkpoints")
            self.cards = html_block(elem_id="checkpoints", js_on_load=CLICKS)


def connect(context: Context, view: ChooserView, run: Any) -> None:
    """Connect the fields; ``run`` holds the id of the run that is shown."""

    def now(job_id: str) -> list[Any]:
        parts = refresh(context, context.jobs(fresh=True), context.job(job_id))
        return [filled(parts[name]) for name in ("chooser", "chooser_start", "chooser_cards")]

    @plain
    def start(job_id: str | None) -> list[Any]:
        job = context.job(job_id)
        running = _ranking_of(context.jobs(fresh=True), job)
        if running is None or running.has_ended:
            start_ranking(context.workspace, job)
            context.queue.tick()
        return now(job.id)

    @plain
    def click(job_id: str | None, event: gr.EventData) -> list[Any]:
        job = context.job(job_id)
        what, value = clicked(event)
        if what == "stop":
            stop_job(context.workspace.job(value))
        else:
            step = choose(job, value)
            gr.Info(
                f"Step {step} is now used for this run in Generate and in the Library.", title=""
            )
        return now(job.id)

    outputs = [view.box, view.start, view.cards]
    view.start.click(start, [run], outputs, **QUIET)
    view.cards.click(click, [run], outputs, **QUIET)


def _ranking_of(jobs: Sequence[Job], run: Job | None) -> Job | None:
    """The newest job that ranks a run's checkpoints."""
    about_it = (job for job in jobs if job.kind == "rank-checkpoints" and run)
    return next((job for job in about_it if run and job.record.run == run.id), None)


def refresh(context: Context, jobs: Sequence[Job], job: Job | None) -> dict[str, Any]:
    """Return the timer's update: whether the chooser shows, its button, and its cards."""
    shown = bool(job and job.has_ended and job.candidates)
    running = _ranking_of(jobs, job)
    busy = running is not None and not running.has_ended
    ranking, damage = None, ""
    if job and shown:
        try:
            ranking = read_ranking(context.workspace, job)
        except DamagedFile as error:
            damage = html.note(f"{error}, or rank again", "bad")
    label = "Rank again" if ranking else "Rank the checkpoints"
    return {
        "chooser": changing(visible=shown),
        "chooser_start": changing(value=label, visible=not busy),
        "chooser_cards": damage + _cards(job, ranking, running) if job and shown else "",
    }


def _cards(job: Job, ranking: Ranking | None, running: Job | None) -> str:
    status = ""
    if running is not None and not running.has_ended:
        status = html.status_card(running, stop=True)
    elif running is not None:
        failed = f"The ranking failed: {running.cause}" if running.cause else ""
        status = html.note(failed, "bad") + html.notes(log_warnings(running.folder), "warn")
    if ranking is None:
        return status
    most = max((row.drift or 0 for row in ranking.rows), default=0) or 1
    cards = "".join(_card(job, row, ranking, most) for row in ranking.rows)
    late = [f"step {job.step_of(name)}" for name in ranking.missing]
    new = html.note(f"Not ranked: {', '.join(late)}.", "info") if late else ""
    notes = "".join(map(html.quiet, ranking.notes))
    if ranking.suggested:
        notes += html.quiet(
            "Suggested: the most similarity less drift, among those that are more like the "
            "subject than the base."
        )
    verdict = html.note(ranking.verdict, "warn")
    return f"{status}{new}{verdict}<div class='dd-choices'>{cards}</div>{notes}"


def _card(job: Job, row: RankedCheckpoint, ranking: Ranking, most_drift: float) -> str:
    """One checkpoint: images, two bars, and the button."""
    in_use = row.name == job.stands
    title = f"Step {row.step}" if row.step else "Base model"
    marks = html.pill("suggested", "running") if row.name == ranking.suggested else ""
    if in_use:
        marks += html.pill("in use", "done")
    elif row.step:
        marks += html.button("Use this", "use", row.name)
    strips = "".join(html.image(path, title) for path in row.images)
    figures = ""
    if row.similarity is not None:
        to = f" to {ranking.similar_to}" if ranking.similar_to else ""
        figures = _bar("similarity", row.similarity, row.similarity, f"similarity{to}")
    if row.step and row.drift is not None:
        figures += _bar("drift", row.drift, row.drift / most_drift)
    if row.loss is not None:
        figures += f"<span>denoising loss, held-out photos</span><i></i><b>{row.loss:.4f}</b>"
    return (
        f"<div class='dd-choice{' dd-in-use' if in_use else ''}'>"
        f"<div class='dd-row'><h3>{title}</h3><span class='dd-marks'>{marks}</span></div>"
        f"<div class='dd-strips'>{strips}</div><div class='dd-bars'>{figures}</div></div>"
    )


def _bar(name: str, value: float, share: float, label: str = "") -> str:
    width = f"{min(1.0, max(0.0, share)):.0%}"
    return (
        f"<span>{html.esc(label or name)}</span>"
        f"<div class='dd-bar dd-{name}'><div style='width:{width}'></div></div><b>{value:.2f}</b>"
    )
