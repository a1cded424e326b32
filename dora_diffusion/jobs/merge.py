"""The job of merging: what ``dora-diffusion export`` does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dora_diffusion.console.shell import shown_command
from dora_diffusion.jobs.checkpoints import chosen_adapter
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.exports import file_name
from dora_diffusion.jobs.loading import ModelFiles
from dora_diffusion.jobs.queue import create_job
from dora_diffusion.jobs.records import MergeRequest, ProgressFile
from dora_diffusion.jobs.snapshot import Job
from dora_diffusion.jobs.workspace import Workspace

MERGED = "merged.safetensors"


def start_merge(workspace: Workspace, run: Job, strength: float, checkpoint: str = "") -> str:
    """Queue a job that merges a run's adapter into its base, as one file. Returns its id.

    Raises:
        RequestError: If the run has no adapter, or the strength is out of its limits.
    """
    if not -2 <= strength <= 3:
        raise RequestError(f"the strength is {strength:g}; it must be between -2 and 3")
    # What is in the file, so that no merge replaces another one.
    content = file_name(run, f"strength-{strength:g}", checkpoint)
    request = MergeRequest(
        run=run.id,
        base=run.base,
        adapter=str(chosen_adapter(run, checkpoint)),
        output=str(workspace.exports / run.id / f"{content}-{MERGED}"),
        strength=float(strength),
        trigger=run.trigger,
        **dataclasses.asdict(ModelFiles.of(run.settings)),
    )
    return create_job(workspace, request, f"Merge {run.title}")


def merge_command(request: MergeRequest) -> str:
    """The command that merges as the job does."""
    words = ["--base", request.base, "--adapter", request.adapter, "--output", request.output]
    if request.strength != 1:
        words += ["--strength", f"{request.strength:g}"]
    words += request.files.flags
    return shown_command([["python", "-m", "dora_diffusion", "export", *words]])


def run_merge(request: MergeRequest, note: ProgressFile) -> None:
    """Merge, counting bytes."""
    from dora_diffusion.export import export_checkpoint

    note(phase="merging")

    def show(done: int, total: int) -> None:
        note(often=done < total, done=done, total=total)

    output = Path(request.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    export_checkpoint(
        request.base,
        request.adapter,
        output,
        strength=request.strength,
        vae=request.vae,
        variant=request.variant,
        revision=request.revision,
        config=request.config,
        overwrite=True,
        on_progress=show,
    )
    print(f"{output} (reopened and checked)")
