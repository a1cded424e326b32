"""The adapters of a training run: checkpoints, result, how they rank, and which is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dora_diffusion.evaluation.ranking import Ranking
from dora_diffusion.formats.files.runs import (
    BASE_NAME,
    COMPARISON,
    PIPELINE_NAME,
    RESULT_NAME,
    pipeline_in,
    result_adapter,
)
from dora_diffusion.studio.jobs.records import CHOSEN, checked
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.workspace import (
    UserError,
    Workspace,
    read_object,
    write_json,
)


def choose(job: Job, name: object) -> int:
    """Make a checkpoint the run's adapter: what Generate and Library take. Returns its step.

    Raises:
        UserError: If the run has no such checkpoint.
    """
    if not isinstance(name, str) or name not in {*job.candidates, *job.checkpoints}:
        raise UserError("this checkpoint no longer exists; choose another one")
    write_json(job.folder / CHOSEN, {"checkpoint": name})
    return job.step_of(name)


def adapter_of(job: Job, name: str = "") -> Path | None:
    """The adapter that is selected for a run, or another one of its by name."""
    name = name or job.stands
    if name == RESULT_NAME:
        return result_adapter(job.folder) if job.has_result else None
    return result_adapter(job.folder / name) if name in job.checkpoints else None


def chosen_adapter(job: Job, checkpoint: str = "") -> Path:
    """The adapter of a run or of one of its checkpoints.

    Raises:
        UserError: If the run has none.
    """
    path = adapter_of(job, checkpoint)
    if path is None and pipeline_in(job.folder):
        raise UserError(
            f"this run fine-tuned the model itself, which is in {job.folder / PIPELINE_NAME}; it "
            "has no adapter. Train offers it as a base model, and 'dora-diffusion generate --base' "
            "takes it"
        )
    if path is None:
        raise UserError("this run has no adapter yet; wait until it is done, or take a checkpoint")
    return path


def read_ranking(workspace: Workspace, job: Job) -> Ranking | None:
    """Read the ranking of a run's checkpoints; None before that.

    Raises:
        DamagedFile: If comparison.json cannot be read.
    """
    path = workspace.ranking(job.id) / COMPARISON
    values = read_object(path)
    if values is None:
        return None
    told, known = checked(Ranking, values, path), {BASE_NAME, *job.candidates, *job.checkpoints}
    rows = tuple(
        replace(
            row,
            images=tuple(path.parent / image for image in row.images),
            step=0 if row.name == BASE_NAME else job.step_of(row.name),
        )
        for row in told.rows
        if row.name in known
    )
    measured = {row.name for row in rows}
    missing = tuple(name for name in job.candidates if name not in measured)
    return replace(told, rows=rows, missing=missing)
