"""Adapters that were made elsewhere become runs; stars and notes of runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dora_diffusion.formats.layouts.layout import AdapterFormatError
from dora_diffusion.studio.jobs import tasks
from dora_diffusion.studio.jobs.queue import delete_job, waiting_jobs
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter, read_run
from dora_diffusion.studio.jobs.store import UserError, Workspace
from tests.studio.jobs.helpers import seen

GOLDEN = Path(__file__).parents[2] / "formats/golden/0.1.0"


def imported(workspace: Workspace, file: Path, name: str = "", base: str = "") -> Job:
    made = tasks.import_adapter(workspace, file, name, base, lambda base: base)
    return read_run(workspace, made)


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.safetensors")), ids=lambda file: file.stem)
def test_an_adapter_of_any_key_format_is_a_run_that_has_ended(
    workspace: Workspace, file: Path
) -> None:
    run = imported(workspace, file)
    assert (run.state, run.title, run.damage) == ("done", file.stem, ())
    assert chosen_adapter(run).read_bytes() == file.read_bytes()
    assert run.stands == "result"
    assert run.base
    assert waiting_jobs(workspace) == []
    job = seen(workspace.root / tasks.start_task("export", workspace, run, "1"))
    assert str(chosen_adapter(run)) in job.record.arguments
    delete_job(workspace, run.id)
    assert workspace.job_folders == []


def test_an_import_has_the_name_and_base_that_it_is_given(workspace: Workspace) -> None:
    file = GOLDEN / "kohya-dora-output.safetensors"
    run = imported(workspace, file, " My  dog ", "org/model")
    assert (run.title, run.base) == ("My dog", "org/model")
    tasks.rename_run(workspace, run.id, "Rex")
    assert seen(run.folder).title == "Rex"

    def allowed(base: str) -> str:
        raise UserError(f"{base} is not on the list")

    with pytest.raises(UserError, match="is not on the list"):
        tasks.import_adapter(workspace, file, "", "", allowed)
    with pytest.raises(UserError, match="publish the runs that you trained"):
        tasks.start_task("push", workspace, run, "ann/mug", False)
    merge = seen(workspace.root / tasks.start_task("export", workspace, run, "1"))
    assert str(chosen_adapter(run)) in merge.record.arguments


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: p.write_bytes(b"x" * 99), "."),
        (lambda p: p.write_bytes(b""), "."),
        (lambda p: p.rename(p.with_suffix(".pt")), "can run a program"),
        (lambda p: (p.unlink(), p.symlink_to("/etc/passwd")), "not an ordinary file"),
        (lambda p: p.unlink(), "not an ordinary file"),
    ],
)
def test_what_is_no_adapter_leaves_nothing(
    workspace: Workspace, tmp_path: Path, spoil, reason: str
) -> None:
    file = shutil.copy(GOLDEN / "kohya-dora-output.safetensors", tmp_path / "a.safetensors")
    spoil(file)
    file = next((p for p in tmp_path.glob("a.*")), file)
    with pytest.raises((UserError, AdapterFormatError), match=reason):
        imported(workspace, file)
    assert workspace.job_folders == []
