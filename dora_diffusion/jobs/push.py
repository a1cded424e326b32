"""The job of publishing: what ``dora-diffusion push`` does."""

from __future__ import annotations

from dora_diffusion.jobs.checkpoints import chosen_adapter
from dora_diffusion.jobs.exports import card_of
from dora_diffusion.jobs.queue import create_job
from dora_diffusion.jobs.records import ProgressFile, PushRequest
from dora_diffusion.jobs.snapshot import Job, read_run
from dora_diffusion.jobs.workspace import Workspace, clean_text


def start_push(workspace: Workspace, run: Job, repository: object, private: bool) -> str:
    """Queue a job that publishes a run on the hub. Returns its id.

    Raises:
        RequestError: If the run has no adapter.
        HubError: If it could not begin: no token, offline, or no name.
    """
    from dora_diffusion.hub import check

    name = clean_text(repository, 200, "repository")
    chosen_adapter(run)
    check(name)
    request = PushRequest(run=run.id, repository=name, private=bool(private))
    return create_job(workspace, request, f"Publish {run.title}")


def run_push(workspace: Workspace, request: PushRequest, note: ProgressFile) -> None:
    """Publish what stands for a run."""
    from dora_diffusion.hub import push

    run = read_run(workspace, request.run)
    note(phase="uploading")
    address = push(
        run.folder,
        request.repository,
        private=request.private,
        adapter=chosen_adapter(run),
        card=card_of(run),
    )
    note(phase="uploaded", address=address, done=1, total=1)
    print(address)
