"""The Compare tab: methods of training side by side, as ``dora-diffusion compare`` does it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.config import TrainConfig
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.html import task_card
from dora_diffusion.studio.app.settings import EMBEDDED, SETTINGS, preset_values
from dora_diffusion.studio.app.views import train, ui
from dora_diffusion.studio.jobs import queue
from dora_diffusion.studio.jobs.bases import check_base
from dora_diffusion.studio.jobs.deletions import run_question
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.store import REMAINS, UserError
from dora_diffusion.studio.jobs.subjects import read_subject, subjects_in
from dora_diffusion.studio.jobs.tasks import MOST_STEPS, start_study

_METHODS: dict[str, dict[str, Any]] = {
    "dora": {}, "lora": {"method": "lora"}, "full": {"method": "full", "full_weights": "targets"},
}  # fmt: skip
_MOST_SEEDS = 10
_NOTHING = html.empty(
    "Nothing compared yet", "Choose subjects and methods: tables and plots appear here."
)

_GONE = html.empty("No comparison is chosen", "The one that was shown was deleted; choose another.")


class CompareTab:
    """The tab's fields."""

    def __init__(self, context: Context) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                text = "Each is trained on the same subjects and seeds, and measured."
                ui.html_block(html.heading("7", "Compare methods", text))
                self.subjects = ui.id_checkbox_group(label="Subjects", elem_id="study-subjects")
                names = list(zip(("DoRA", "LoRA", "Full fine-tuning"), _METHODS, strict=True))
                self.methods = gr.CheckboxGroup(names, value=["dora", "lora"], label="Methods")
                with gr.Row():
                    self.seeds = gr.Slider(1, _MOST_SEEDS, 2, step=1, label="Seeds", min_width=140)
                    self.steps = gr.Number(100, label="Steps", precision=0, elem_id="study-steps")
                self.base = gr.Dropdown(
                    [(base.label, base.name) for base in context.bases()],
                    value=EMBEDDED,
                    label="Base model",
                    allow_custom_value=not context.launch.is_open,
                )
                self.start = ui.button("Compare", "study", variant="primary", size="lg")
            with gr.Column(scale=6, min_width=320):
                self.study = ui.id_dropdown(label="Comparison", visible=False)
                self.status = ui.html_block(_NOTHING, elem_id="study-status", js_on_load=ui.CLICKS)
                self.report = gr.Markdown(elem_id="study-report")
                self.delete = ui.button(
                    "Delete this comparison", visible=False, variant="stop", size="lg"
                )


def connect(context: Context, tab: CompareTab) -> None:
    """Connect the fields to their actions."""

    def now(chosen: str | None) -> list[Any]:
        parts = refresh(context, context.queued(), chosen)
        return [ui.filled(parts["study"]), parts["study_status"]]

    def start(subjects: Any, methods: Any, seeds: Any, steps: Any, base: str | None) -> list[Any]:
        study = _study(context, methods, int(seeds or 0), int(steps or 0), base)
        stored = [read_subject(context.workspace, one) for one in subjects or []]
        made = start_study(context.workspace, study, stored)
        field, status = now(made)
        return [{**field, "value": made}, status]

    def click(chosen: str | None, event: gr.EventData) -> list[Any]:
        what, job_id = ui.clicked(event)
        folder = context.workspace.job(job_id)
        (queue.stop_job if what == "stop" else queue.requeue_job)(folder)
        return now(chosen)

    def delete(chosen: str) -> list[Any]:
        if not queue.delete_job(context.workspace, context.job(chosen).id):
            gr.Info(REMAINS)
        return now(chosen)

    shown = [tab.study, tab.status]
    asked = [tab.subjects, tab.methods, tab.seeds, tab.steps, tab.base]
    ui.on(tab.start.click, start, asked, shown, show="minimal")
    ui.on(tab.status.click, click, [tab.study], shown)
    question = functools.partial(run_question, context.workspace)
    ui.on(tab.delete.click, delete, [tab.study], shown, confirm=question)


def _study(
    context: Context, methods: Any, seeds: int, steps: int, base: str | None
) -> dict[str, Any]:
    """Return the settings of a study that the fields ask for, without its subjects.

    Raises:
        UserError: If a value is out of its limits, or the base may not be loaded.
    """
    names = [name for name in _METHODS if isinstance(methods, list) and name in methods]
    if not names:
        raise UserError("choose at least one method")
    for what, value, most in (("seeds", seeds, _MOST_SEEDS), ("steps", steps, MOST_STEPS)):
        if not 1 <= value <= most:
            raise UserError(f"{what} is {value}; it must be between 1 and {most}")
    model = context.allowed_model(base)
    check_base(model)
    given, usual = preset_values("balanced", model, context.device()), TrainConfig().to_dict()
    # What a preset is about; where a run lies and what it saves is the study's own business.
    common = {
        name: value
        for name, value in given.items()
        if value != usual[name] and SETTINGS[name].resume != "ignored" and "validation" not in name
    }
    rate = given["learning_rate"] or TrainConfig().usual_lr
    # Weights themselves take as much smaller a rate as by default.
    full_rate = rate * TrainConfig(method="full").usual_lr / TrainConfig().usual_lr
    tuned = {name: dict(_METHODS[name]) for name in names}
    if "full" in tuned:
        tuned["full"]["learning_rate"] = full_rate
    return {
        "base": model,
        "methods": tuned,
        "seeds": seeds,
        "common": common | {"learning_rate": rate, "max_train_steps": steps},
        "asked": {"guidance_scale": given["validation_guidance_scale"]},
    }


def refresh(
    context: Context, jobs: Sequence[Job], chosen: str | None, more: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Return the timer's update of this tab; ``more`` holds further choices by their names."""
    studies = [job for job in jobs if job.kind == "compare"]
    newest = next(iter(studies), None)
    job = next((job for job in studies if job.id == chosen), None) if chosen else newest
    choices = [(f"{job.label} · {job.shown_state}", job.id) for job in studies]
    status = _GONE if studies else _NOTHING
    if job:
        has_more = job.state in ("stopped", "failed", "crashed")
        status = task_card(job) + (html.button("Continue", "resume", job.id) if has_more else "")
    page = Path(job.record.output, "report.md") if job else None
    modified = page.stat().st_mtime_ns if page and page.is_file() else 0
    subjects = [(subject.title, subject.id) for subject in subjects_in(context.workspace)]
    return {
        "study": ui.choosing(choices, chosen, newest and newest.id, visible=bool(choices)),
        "study_status": status,
        "study_report": ((str(page), modified), lambda: _report(page if modified else None)),
        "study_subjects": ui.choosing(subjects, more.get("study_subjects")),
        "study_base": train.base_choices(context, more.get("study_base")),
        "study_delete": ui.changing(visible=bool(job and job.has_ended)),
    }


def _report(page: Path | None) -> str:
    """A report with its tables; its images from where the server gives them out."""
    if page is None:
        return ""
    text, folder = page.read_text(encoding="utf-8"), page.parent
    return re.sub(
        r"!\[(.*?)\]\((.*?)\)", lambda of: f"![{of[1]}]({html.address(folder / of[2])})", text
    )
