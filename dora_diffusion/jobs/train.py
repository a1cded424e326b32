"""The job of training: what ``dora-diffusion train --config settings.yaml`` does."""

from __future__ import annotations

import dataclasses
import filecmp
import time
from pathlib import Path
from typing import Any

from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.queue import create_job, requeue_job
from dora_diffusion.jobs.records import (
    SETTINGS,
    STOPPED_CODE,
    ProgressFile,
    TrainRequest,
    read_record,
    write_record,
)
from dora_diffusion.jobs.snapshot import Job, read_job, snapshot
from dora_diffusion.jobs.subjects import StoredSubject
from dora_diffusion.jobs.workspace import Workspace, clean_text

NAME_LIMIT = 60
MOST_STEPS = 1_000_000


def start_training(
    workspace: Workspace, config: TrainConfig, subject: StoredSubject, name: str = ""
) -> str:
    """Put a run at the end of the queue, with a copy of its photos. Returns its id.

    Without a name it is called by its subject and the time.

    Raises:
        RequestError: If a run with the same photos and settings waits or runs: it would repeat it.
    """
    for job in snapshot(workspace.root):
        if job.state in ("waiting", "running") and _is_same(job, config, subject):
            now = f"number {job.position} in the queue" if job.position else "running"
            raise RequestError(
                f"{job.title} with the same photos and settings is {now} already; change a "
                "setting, such as seed, to start another run"
            )
    base = config.pretrained_model_name_or_path
    return create_job(
        workspace,
        TrainRequest(base=base, subject=subject.id, sample=subject.sample),
        clean_text(name, NAME_LIMIT, "name") or f"{subject.title} {time.strftime('%H:%M')}",
        lambda folder: as_yaml(_in_folder(config, folder)),
        subject.folder,
    )


def rename_run(workspace: Workspace, job_id: object, name: object) -> None:
    """Call a run by another name, and what was made of it too.

    Raises:
        RequestError: If there is no such run, or the name is empty or too long.
    """
    folder, title = workspace.job(job_id), clean_text(name, NAME_LIMIT, "name")
    if not title:
        raise RequestError("write a name for the run")
    run = read_record(folder)
    for job in workspace.job_folders:
        record = read_record(job)
        if run and record and folder.name in (job.name, record.request.run):
            called = title if job == folder else record.title.replace(run.title, title)
            write_record(job, dataclasses.replace(record, title=called))


def can_continue(job: Job) -> bool:
    """Whether a run is finished and has a checkpoint of its last step."""
    return job.state == "done" and f"checkpoint-{job.step}" in job.checkpoints


def continue_run(folder: Path, more: object) -> None:
    """Put a finished run back into the queue to train ``more`` steps from its last one on.

    Raises:
        RequestError: If it cannot be continued, or that is no number of steps.
    """
    job = read_job(folder)
    if job is None or not can_continue(job):
        raise RequestError(
            "only a finished run that kept a checkpoint of its last step can be continued"
        )
    if not isinstance(more, (int, float)) or not 1 <= more <= MOST_STEPS:
        raise RequestError(f"more steps is {more}; it must be between 1 and {MOST_STEPS}")
    config = TrainConfig.from_dict(job.settings)
    config = dataclasses.replace(config, max_train_steps=job.step + int(more))
    save_text(folder / SETTINGS, as_yaml(config))
    requeue_job(folder)


def _is_same(job: Job, config: TrainConfig, subject: StoredSubject) -> bool:
    """Whether a job trains with these settings on these photos, captions and masks."""
    if job.settings != _in_folder(config, job.folder).to_dict():
        return False
    files = filecmp.dircmp(subject.folder, job.folder / "photos")
    return not (files.left_only or files.right_only or files.diff_files)


def _in_folder(config: TrainConfig, folder: Path) -> TrainConfig:
    photos = str(folder / "photos")
    return dataclasses.replace(config, output_dir=str(folder), instance_data_dir=photos)


def run_training(folder: Path, resume: bool, note: ProgressFile) -> int:
    """Train, or resume. Returns the exit code."""
    from dora_diffusion.console.training import TrainProgress
    from dora_diffusion.memory import describe_device

    note(phase="loading the model", device_name=describe_device().name)
    from dora_diffusion.training.checkpoint import checkpoints_in
    from dora_diffusion.training.events import Event, StepDone, TrainingStarted
    from dora_diffusion.training.loop import train

    config = TrainConfig.from_dict(read_config_file(folder / SETTINGS))
    if resume:
        # Without a checkpoint there is nothing to resume from, and nothing to lose.
        changes: dict[str, Any] = {"overwrite_output_dir": True}
        if checkpoints_in(Path(config.output_dir)):
            changes = {"resume_from_checkpoint": "latest"}
        config = dataclasses.replace(config, **changes)
    show = TrainProgress()

    def on_event(event: Event) -> None:
        show(event)
        if isinstance(event, TrainingStarted):
            note(
                phase="training",
                first_step=event.step,
                total_steps=event.total_steps,
                trigger=event.trigger,
            )
        elif isinstance(event, StepDone) and event.step == event.total_steps:
            note(phase="saving and sampling")

    return STOPPED_CODE if train(config, on_event).interrupted else 0
