"""The Compare tab: training methods side by side, as in ``python -m lab compare``."""

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
    """Fields of the tab."""

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

    def now(study_id: str | None) -> list[Any]:
        updates = refresh(context, context.queued(), study_id)
        return [ui.filled(updates["study"]), updates["study_status"]]

    def start(subjects: Any, methods: Any, seeds: Any, steps: Any, base: str | None) -> list[Any]:
        study = _study(context, methods, int(seeds or 0), int(steps or 0), base)
        stored = [read_subject(context.workspace, one) for one in subjects or []]
        study_id = start_study(context.workspace, study, stored)
        field, status = now(study_id)
        return [{**field, "value": study_id}, status]

    def click(study_id: str | None, event: gr.EventData) -> list[Any]:
        action, job_id = ui.clicked(event)
        folder = context.workspace.job(job_id)
        (queue.stop_job if action == "stop" else queue.requeue_job)(folder)
        return now(study_id)

    def delete(study_id: str) -> list[Any]:
        if not queue.delete_job(context.workspace, context.job(study_id).id):
            gr.Info(REMAINS)
        return now(study_id)

    outputs = [tab.study, tab.status]
    form = [tab.subjects, tab.methods, tab.seeds, tab.steps, tab.base]
    ui.on(tab.start.click, start, form, outputs, show="minimal")
    ui.on(tab.status.click, click, [tab.study], outputs)
    question = functools.partial(run_question, context.workspace)
    ui.on(tab.delete.click, delete, [tab.study], outputs, confirm=question)


def _study(
    context: Context, methods: Any, seeds: int, steps: int, base: str | None
) -> dict[str, Any]:
    """Return the settings of a study from the fields, without its subjects.

    Raises:
        UserError: If a value is outside its limits, or the base model may not be loaded.
    """
    names = [name for name in _METHODS if isinstance(methods, list) and name in methods]
    if not names:
        raise UserError("choose at least one method")
    for field, value, most in (("seeds", seeds, _MOST_SEEDS), ("steps", steps, MOST_STEPS)):
        if not 1 <= value <= most:
            raise UserError(f"{field} is {value}; it must be between 1 and {most}")
    model = context.allowed_model(base)
    check_base(model)
    preset, usual = preset_values("balanced", model, context.device()), TrainConfig().to_dict()
    # Only training settings of the preset; the study sets folders and saving itself.
    common = {
        name: value
        for name, value in preset.items()
        if value != usual[name] and SETTINGS[name].resume != "ignored" and "validation" not in name
    }
    rate = preset["learning_rate"] or TrainConfig().usual_lr
    # Full fine-tuning keeps the ratio of the default rates.
    full_rate = rate * TrainConfig(method="full").usual_lr / TrainConfig().usual_lr
    tuned = {name: dict(_METHODS[name]) for name in names}
    if "full" in tuned:
        tuned["full"]["learning_rate"] = full_rate
    return {
        "base": model,
        "methods": tuned,
        "seeds": seeds,
        "common": common | {"learning_rate": rate, "max_train_steps": steps},
        "asked": {"guidance_scale": preset["validation_guidance_scale"]},
    }


def refresh(
    context: Context, jobs: Sequence[Job], study_id: str | None, more: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Return the timer's update of this tab; ``more`` are further choices by name."""
    studies = [job for job in jobs if job.kind == "compare"]
    newest = next(iter(studies), None)
    job = next((job for job in studies if job.id == study_id), None) if study_id else newest
    choices = [(f"{job.label} · {job.shown_state}", job.id) for job in studies]
    status = _GONE if studies else _NOTHING
    if job:
        has_more = job.state in ("stopped", "failed", "crashed")
        status = task_card(job) + (html.button("Continue", "resume", job.id) if has_more else "")
    page = Path(job.record.output, "report.md") if job else None
    modified = page.stat().st_mtime_ns if page and page.is_file() else 0
    subjects = [(subject.title, subject.id) for subject in subjects_in(context.workspace)]
    return {
        "study": ui.choosing(choices, study_id, newest and newest.id, visible=bool(choices)),
        "study_status": status,
        "study_report": ((str(page), modified), lambda: _report(page if modified else None)),
        "study_subjects": ui.choosing(subjects, more.get("study_subjects")),
        "study_base": train.base_choices(context, more.get("study_base")),
        "study_delete": ui.changing(visible=bool(job and job.has_ended)),
    }


def _report(page: Path | None) -> str:
    """Return a report as Markdown, with URLs that the server serves for its images."""
    if page is None:
        return ""
    text, folder = page.read_text(encoding="utf-8"), page.parent
    return re.sub(
        r"!\[(.*?)\]\((.*?)\)", lambda of: f"![{of[1]}]({html.address(folder / of[2])})", text
    )
