"""The adapters of a run, and which of them stands for it."""

from __future__ import annotations

import dataclasses

import pytest

from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.snapshot import adapter_of, choose
from dora_diffusion.studio.jobs.store import UserError, Workspace, write_json
from tests.studio.jobs.helpers import (
    ended_run,
    seen,
)


def test_candidates_are_the_checkpoints_and_the_result_without_a_twin(workspace: Workspace) -> None:
    stopped = ended_run(workspace, (50, 100), 100)
    assert stopped.candidates == ("checkpoint-50", "checkpoint-100")
    done = dataclasses.replace(stopped, state="done")
    assert done.candidates == ("checkpoint-50", "result")
    assert dataclasses.replace(done, step=120).candidates[-2:] == ("checkpoint-100", "result")


def test_of_many_checkpoints_some_are_compared_and_the_last_always(workspace: Workspace) -> None:
    job = ended_run(workspace, tuple(range(10, 310, 10)), 305)
    names = job.candidates
    assert len(names) == 8
    assert (names[0], names[-1]) == ("checkpoint-10", "checkpoint-300")


def test_what_was_chosen_stands_for_the_run(workspace: Workspace) -> None:
    job = ended_run(workspace, (50, 100), 120)
    assert adapter_of(job) == job.folder / "checkpoint-100" / "pytorch_lora_weights.safetensors"
    assert choose(job, "checkpoint-50") == 50
    job = seen(job.folder)
    assert (job.chosen, job.stands) == ("checkpoint-50", "checkpoint-50")
    assert adapter_of(job) == job.folder / "checkpoint-50" / "pytorch_lora_weights.safetensors"
    (job.folder / "checkpoint-50" / "pytorch_lora_weights.safetensors").unlink()
    assert seen(job.folder).stands == "checkpoint-100"


@pytest.mark.parametrize(
    "name", ["checkpoint-7", "result", "base", "../other", "", None, 3, ["checkpoint-50"]]
)
def test_only_what_is_there_can_be_chosen(workspace: Workspace, name: object) -> None:
    job = ended_run(workspace, (50,), 60)
    with pytest.raises(UserError, match="no longer exists"):
        choose(job, name)
    assert not (job.folder / records.CHOSEN).exists()


@pytest.mark.parametrize("name", ["../../etc/passwd", 5, None, {"a": 1}])
def test_a_tampered_choice_is_ignored(workspace: Workspace, name: object) -> None:
    job = ended_run(workspace, (50,), 60)
    write_json(job.folder / records.CHOSEN, {"checkpoint": name})
    assert seen(job.folder).stands == "checkpoint-50"
