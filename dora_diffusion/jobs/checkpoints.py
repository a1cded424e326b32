"""The adapters of a training run: its checkpoints, its result, and which of them stands for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.formats.files.names import PIPELINE_NAME, pipeline_in
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.records import CHOSEN
from dora_diffusion.jobs.workspace import read_json, write_json

if TYPE_CHECKING:
    from dora_diffusion.jobs.snapshot import Job

RESULT_NAME = "result"
# More rows than a page can show, and a comparison that takes longer than the run.
MOST_COMPARED = 8
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Of a VeRA's checkpoints, the compact file alone.
_ADAPTERS = (
    "pytorch_lora_weights.safetensors", "dora_kohya.safetensors", "vera.safetensors",
)  # fmt: skip


def result_adapter(folder: Path) -> Path | None:
    """The adapter file that a finished run left, or that a checkpoint holds."""
    return next((folder / name for name in _ADAPTERS if (folder / name).is_file()), None)


def adapter_checkpoints(folder: Path) -> tuple[str, ...]:
    """Names of a run's complete checkpoints with an adapter, oldest first."""
    numbered = [
        (int(match[1]), path.name)
        for path in folder.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name)) and result_adapter(path)
    ]
    return tuple(name for _, name in sorted(numbered))


def chosen_in(folder: Path, names: tuple[str, ...]) -> str:
    """What was chosen to stand for a run, if it still is one of these."""
    name = read_json(folder / CHOSEN).get("checkpoint")
    return str(name) if name in names else ""


def choose(job: Job, name: object) -> int:
    """Make a checkpoint the run's adapter: what Generate and Library take. Returns its step.

    Raises:
        RequestError: If the run has no such checkpoint.
    """
    if not isinstance(name, str) or name not in {*candidates(job), *job.checkpoints}:
        raise RequestError("this checkpoint no longer exists; choose another one")
    write_json(job.folder / CHOSEN, {"checkpoint": name})
    return job.step_of(name)


def candidates(job: Job) -> tuple[str, ...]:
    """What can be chosen: spread over the run, the last ones always."""
    names = list(job.checkpoints)
    # At the last step there often is a checkpoint too, with the same weights.
    if job.state == "done":
        last = f"checkpoint-{job.step}"
        names = [name for name in names if name != last] + [RESULT_NAME]
    if len(names) > MOST_COMPARED:
        last_place = len(names) - 1
        places = (round(i * last_place / (MOST_COMPARED - 1)) for i in range(MOST_COMPARED))
        names = [names[place] for place in places]
    return tuple(names)


def adapter_of(job: Job, name: str = "") -> Path | None:
    """The adapter that stands for a run, or another one of its by name."""
    name = name or job.stands
    if name == RESULT_NAME:
        return result_adapter(job.folder) if job.state == "done" else None
    return result_adapter(job.folder / name) if name in job.checkpoints else None


def chosen_adapter(job: Job, checkpoint: str = "") -> Path:
    """The adapter of a run or of one of its checkpoints.

    Raises:
        RequestError: If the run has none.
    """
    path = adapter_of(job, checkpoint)
    if path is None and pipeline_in(job.folder):
        raise RequestError(
            f"this run fine-tuned the model itself, which is in {job.folder / PIPELINE_NAME}; it "
            "has no adapter. Train offers it as a base model, and 'dora-diffusion generate --base' "
            "takes it"
        )
    if path is None:
        raise RequestError(
            "this run has no adapter yet; wait until it is done, or take a checkpoint"
        )
    return path
