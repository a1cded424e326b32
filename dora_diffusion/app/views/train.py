"""The Train tab: what to learn, what it will cost, and how it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.app import html
from dora_diffusion.app.context import Context, plain
from dora_diffusion.app.estimates import estimate
from dora_diffusion.app.jobs import create_job, delete_job, kill_job, requeue_job, stop_job
from dora_diffusion.app.plot import loss_plot
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
from dora_diffusion.app.snapshot import Job, log_tail, read_metrics
from dora_diffusion.app.subjects import Subject, mask_path, read_subject
from dora_diffusion.app.views import chooser
from dora_diffusion.app.views.fields import id_dropdown, setting_field
from dora_diffusion.app.views.subject import SubjectTab
from dora_diffusion.app.workspace import AppError
from dora_diffusion.config import TrainConfig

_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_PROMPTS = "a photo of a {subject} on the snow\na photo of a {subject} at night"
_NOTHING = html.empty(
    "Nothing trained yet",
    "Choose a subject, say what it is, and start: progress, loss and sample pictures appear here.",
)


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
    run: Any
    status: Any
    loss: Any
    log: Any
    jobs: Any
    samples: Any
    stop: Any
    kill: Any
    resume: Any
    remove: Any
    said: Any
    command: Any
    chooser: chooser.Chooser


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
                    info="A word the model does not know.",
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
            run = id_dropdown(label="Run", show_label=False, container=False, elem_id="run")
            status = gr.HTML(_NOTHING, padding=False, elem_id="status")
            with gr.Row():
                stop = gr.Button("Stop and save", visible=False, size="md", elem_id="stop")
                kill = gr.Button("Kill", visible=False, size="md", variant="stop")
                resume = gr.Button("Resume", visible=False, size="md", elem_id="resume")
                remove = gr.Button("Remove", visible=False, size="md")
            loss = gr.HTML("", padding=False, elem_id="loss")
            samples = gr.Gallery(
                show_label=False,
                columns=2,
                height="auto",
                fit_columns=False,
                object_fit="contain",
                buttons=["fullscreen"],
                visible=False,
                format="png",
                elem_id="samples",
            )
            choosing = chooser.build()
            with gr.Accordion("Log", open=False):
                log = gr.HTML("", padding=False, elem_id="log")
            with gr.Accordion("Command line of this run", open=False):
                command = gr.HTML("", padding=False, elem_id="command")
            with gr.Accordion("Queue and history", open=True):
                jobs = gr.HTML("", padding=False, elem_id="jobs")
    return TrainTab(
        class_word, token, preset, model, prompts, advanced, cost, plan, start, run, status, loss,
        log, jobs, samples, stop, kill, resume, remove, said, command, choosing,
    )  # fmt: skip


def connect(context: Context, tab: TrainTab, subjects: SubjectTab) -> None:
    """Say what the fields do."""
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
        return (
            make_config(
                context.allowed_model(model), subject.folder, output, token, class_word, lines,
                chosen,
            ),
            subject,
        )  # fmt: skip

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
        job_id = create_job(
            context.workspace, "train", title, {"subject": subject.id, "sample": subject.sample},
            lambda folder: as_yaml(_in_folder(one, folder)), subject.folder,
        )  # fmt: skip
        context.queue.tick()
        jobs = context.jobs(fresh=True)
        job = next(one for one in jobs if one.id == job_id)
        text = (
            f"{title} is number {job.position} in the queue"
            if job.state == "waiting"
            else f"{title} is starting"
        )
        return [gr.update(choices=run_choices(jobs), value=job_id), html.note(text, "good")]

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
        [tab.preset.input, tab.model.change], use_preset, [tab.preset, tab.model], fields, **_QUIET
    )
    subjects.pick.change(fill, [subjects.pick], [tab.class_word, tab.token], **_QUIET)
    gr.on(
        [field.change for field in (*asked, subjects.names)],
        plan, asked, [tab.cost, tab.plan], trigger_mode="always_last", **_QUIET,
    )  # fmt: skip
    tab.start.click(
        start, asked, [tab.run, tab.said], api_visibility="private", show_progress="minimal"
    )
    _connect_run(context, tab)
    chooser.connect(context, tab.chooser, tab.run)


def _in_folder(config: TrainConfig, folder: Path) -> TrainConfig:
    import dataclasses

    return dataclasses.replace(
        config, output_dir=str(folder), instance_data_dir=str(folder / "photos")
    )


def _shown(value: Any) -> Any:
    return " ".join(value) if isinstance(value, list) else value


def _connect_run(context: Context, tab: TrainTab) -> None:
    """Stop, kill, resume and remove the run that is shown."""
    workspace = context.workspace

    def act(action: Any) -> Any:
        @plain
        def run(job_id: str | None) -> list[Any]:
            if not job_id:  # not confirmed
                return [gr.skip()] * 7
            text = action(workspace.job(job_id))
            return [html.note(text, "info"), *_now(context, job_id)]

        return run

    def stop(folder: Path) -> str:
        stop_job(folder)
        return "The run saves a checkpoint and stops"

    def kill(folder: Path) -> str:
        kill_job(folder)
        return "The run was ended at once"

    def resume(folder: Path) -> str:
        requeue_job(folder)
        context.queue.tick()
        return "The run goes on from its latest checkpoint"

    def remove(folder: Path) -> str:
        delete_job(workspace, folder.name)
        return "The run was removed"

    @plain
    def command(job_id: str | None) -> str:
        if not job_id:
            return html.empty("No run yet", "Its command line appears here.")
        job = context.job(job_id)
        return html.command(command_line(TrainConfig.from_dict(job.settings)))

    outputs = [
        tab.said, tab.run, tab.status, tab.stop, tab.kill, tab.resume, tab.remove,
    ]  # fmt: skip
    for button, action in ((tab.stop, stop), (tab.kill, kill), (tab.resume, resume)):
        button.click(act(action), [tab.run], outputs, **_QUIET)
    tab.remove.click(
        act(remove),
        [tab.run],
        outputs,
        js="(id) => confirm('Remove this run with everything it made?') ? id : ''",
        **_QUIET,
    )
    tab.run.change(command, [tab.run], [tab.command], **_QUIET)


def _now(context: Context, job_id: str | None) -> list[Any]:
    """The run's controls, as `refresh` makes them."""
    parts = refresh(context, context.jobs(fresh=True), job_id)
    names = ("run", "status", "stop", "kill", "resume", "remove")
    return [part[1]() if isinstance(part := parts[name], tuple) else part for name in names]


def run_choices(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    """Training runs by title, time and state."""
    return [
        (f"{job.title} · {job.id[9:11]}:{job.id[11:13]} · {job.state}", job.id)
        for job in jobs
        if job.kind == "train"
    ]


def refresh(context: Context, jobs: Sequence[Job], run: str | None) -> dict[str, Any]:
    """What the clock sends to this tab, in the order of its outputs."""
    training = [job for job in jobs if job.kind == "train"]
    active = next((job for job in training if job.is_active), None)
    job = next((job for job in training if job.id == run), None)
    job = job or active or next(iter(training), None)
    choices = run_choices(jobs)
    value = job.id if job else None

    def button(shown: bool) -> Any:
        return (shown, lambda: gr.update(visible=shown))

    samples = job.samples if job else ()
    stamps = tuple((str(path), path.stat().st_mtime_ns) for path in samples)
    return {
        "run": ((choices, value), lambda: gr.update(choices=choices, value=value)),
        "status": html.status_card(job) if job else _NOTHING,
        "loss": loss_plot(read_metrics(job.folder)) if job else "",
        "log": html.log_view(log_tail(job.folder)) if job else "",
        "jobs": html.queue_list(jobs) or html.empty("No runs yet", "They are listed here."),
        "samples": (stamps, lambda: _sample_gallery(samples)),
        "stop": button(bool(job and (job.state in ("running", "waiting")))),
        "kill": button(bool(job and job.may_kill)),
        "resume": button(bool(job and job.state in ("stopped", "failed", "crashed"))),
        "remove": button(bool(job and job.has_ended)),
        **chooser.refresh(context, jobs, job),
    }


def _sample_gallery(samples: Sequence[Path]) -> Any:
    from PIL import Image

    pictures = []
    for path in samples[:9]:
        with Image.open(path) as image:
            pictures.append((image.convert("RGB"), _sample_title(path.stem)))
    return gr.update(value=pictures, visible=bool(pictures))


def _sample_title(name: str) -> str:
    if name.startswith("step-"):
        return f"step {int(name.removeprefix('step-'))}"
    return {"adapted": "with the adapter", "base": "without it, same seeds"}.get(name, name)
