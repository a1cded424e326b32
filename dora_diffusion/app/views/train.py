"""The Train tab: what to learn, what it will cost, and how it goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.app import html
from dora_diffusion.app.context import Context, plain
from dora_diffusion.app.estimates import estimate
from dora_diffusion.app.jobs import create_job
from dora_diffusion.app.settings import (
    ADVANCED,
    EMBEDDED,
    GROUPS,
    PRESET_NAMES,
    as_yaml,
    command_line,
    make_config,
    preset_values,
)
from dora_diffusion.app.subjects import Subject, mask_path, read_subject
from dora_diffusion.app.views import run
from dora_diffusion.app.views.fields import QUIET, setting_field
from dora_diffusion.app.views.subject import SubjectTab
from dora_diffusion.app.workspace import AppError
from dora_diffusion.config import TrainConfig
from dora_diffusion.training.subject import subject_of

_PROMPTS = "a photo of a {subject} on the snow\na photo of a {subject} at night"


@dataclass(frozen=True)
class TrainTab:
    """The tab's fields that others use too."""

    class_word: Any
    token: Any
    preset: Any
    model: Any
    prompts: Any
    advanced: dict[str, Any]
    cost: Any
    plan: Any
    start: Any
    said: Any
    shown: run.RunView


def build(context: Context, subjects: SubjectTab) -> TrainTab:
    """Make the fields."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            gr.HTML(
                html.heading("3", "What it is", "Of the subject chosen in the Subject tab."),
                padding=False,
            )
            with gr.Row():
                class_word = gr.Textbox(
                    label="Class",
                    info="In one or two words: mug, dog, toy robot.",
                    max_lines=1,
                    min_width=140,
                    elem_id="class-word",
                )
                token = gr.Textbox(
                    "sks",
                    label="Token",
                    info="A rare word, for this subject alone.",
                    max_lines=1,
                    min_width=140,
                )
            preset = gr.Radio(
                [(name.capitalize(), name) for name in PRESET_NAMES],
                value="balanced",
                label="Preset",
                elem_id="preset",
            )
            model = gr.Dropdown(
                context.models,
                value=EMBEDDED,
                label="Base model",
                info="The embedded one trains in minutes on a laptop. Or a hub id, a Diffusers "
                "folder, a .safetensors checkpoint.",
                allow_custom_value=not context.launch.is_open,
            )
            prompts = gr.Textbox(
                _PROMPTS,
                label="Sample prompts, one per line",
                info="{subject} stands for token and class.",
                lines=2,
                max_length=4000,
            )
            advanced: dict[str, Any] = {}
            values = preset_values("balanced", EMBEDDED)
            with gr.Accordion("Advanced settings, by their command-line names", open=False):
                for title, names in GROUPS.items():
                    with gr.Accordion(title, open=False):
                        for name in names:
                            advanced[name] = setting_field(name, values[name])
            cost = gr.HTML(
                html.empty("No subject yet", "Add photos in the Subject tab first."), padding=False
            )
            start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
            said = gr.HTML("", padding=False, elem_id="train-said")
            plan = gr.HTML("", padding=False, elem_id="plan")
        with gr.Column(scale=6, min_width=320):
            gr.HTML(
                html.heading("4", "How it goes", "Close this page if you like: it goes on."),
                padding=False,
            )
            shown = run.build()
    return TrainTab(
        class_word, token, preset, model, prompts, advanced, cost, plan, start, said, shown
    )


def connect(context: Context, tab: TrainTab, subjects: SubjectTab, opened: Any) -> None:
    """Say what the fields do; ``opened`` is the event of the tab being opened."""
    fields = [tab.advanced[name] for name in ADVANCED]
    asked = [subjects.pick, tab.model, tab.token, tab.class_word, tab.prompts, *fields]

    def config(subject_id: str | None, *values: Any) -> tuple[TrainConfig, Subject]:
        model, token, class_word, prompts, *advanced = values
        if not subject_id:
            raise AppError(
                "there is no subject yet: add photos in the Subject tab, or take a sample"
            )
        subject = read_subject(context.workspace, subject_id)
        if not subject.photos:
            raise AppError("the subject has no photos yet; add some in the Subject tab")
        chosen = dict(zip(ADVANCED, advanced, strict=True))
        # Whoever paints a mask wants it used.
        chosen["masked_loss"] |= any(mask_path(photo).exists() for photo in subject.photos)
        output = context.workspace.root / "new-run"
        lines = str(prompts).splitlines()[:8]
        one = make_config(
            context.allowed_model(model), subject.folder, output, token, class_word, lines, chosen
        )
        # The worker would refuse prompts that do not name the subject.
        subject_of(one)
        return one, subject

    def plan(*values: Any) -> list[str]:
        try:
            one, _ = config(*values)
        except (ValueError, OSError) as error:
            text = str(error)
            return [html.note(text[:1].upper() + text[1:], "warn"), ""]
        cost = estimate(one, context.jobs(), context.workspace.root)
        line = html.command(command_line(one))
        return [html.estimate_card(cost, one.max_train_steps), line]

    @plain
    def start(*values: Any) -> list[Any]:
        one, subject = config(*values)
        title = f"{one.token} {one.class_word}"
        facts = {
            "subject": subject.id,
            "sample": subject.sample,
            "base": one.pretrained_model_name_or_path,
        }
        job_id = create_job(
            context.workspace, "train", title, facts,
            lambda folder: as_yaml(_in_folder(one, folder)), subject.folder,
        )  # fmt: skip
        context.queue.tick()
        jobs = context.jobs(fresh=True)
        job = next(one for one in jobs if one.id == job_id)
        text = (
            f"Queued {title}: number {job.position} in the queue"
            if job.state == "waiting"
            else f"Started {title}"
        )
        return [
            gr.update(choices=run.run_choices(jobs), value=job_id, visible=True),
            html.note(text, "good"),
        ]

    @plain
    def use_preset(preset: str, model: str) -> list[Any]:
        return [gr.update(value=_shown(v)) for v in preset_values(preset, model or "").values()]

    def fill(subject_id: str | None) -> list[Any]:
        try:
            subject = read_subject(context.workspace, subject_id)
        except AppError:
            return [gr.skip(), gr.skip()]
        return [subject.class_word or gr.skip(), subject.token]

    gr.on(
        [tab.preset.input, tab.model.change], use_preset, [tab.preset, tab.model], fields, **QUIET
    )
    subjects.pick.change(fill, [subjects.pick], [tab.class_word, tab.token], **QUIET)
    gr.on(
        [*(field.change for field in (*asked, subjects.names)), opened],
        plan, asked, [tab.cost, tab.plan], trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    tab.start.click(
        start, asked, [tab.shown.run, tab.said], api_visibility="private", show_progress="minimal"
    )
    run.connect(context, tab.shown)


def _in_folder(config: TrainConfig, folder: Path) -> TrainConfig:
    import dataclasses

    return dataclasses.replace(
        config, output_dir=str(folder), instance_data_dir=str(folder / "photos")
    )


def _shown(value: Any) -> Any:
    return " ".join(value) if isinstance(value, list) else value
