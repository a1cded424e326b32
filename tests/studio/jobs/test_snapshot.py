"""The state of a job as its folder and its process tell it."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.studio.jobs import queue as jobs
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs import snapshot as snapshots
from dora_diffusion.studio.jobs.queue import _WORKER_MODULE
from dora_diffusion.studio.jobs.snapshot import choose, read_job, snapshot
from dora_diffusion.studio.jobs.store import (
    UserError,
    Workspace,
    read_json,
    remove_folder,
    write_json,
)
from tests.studio.jobs.helpers import (
    DAMAGES,
    about,
    damage,
    ended_run,
    make,
    pretend_running,
    seen,
    started_run,
)
from tests.waiting import STAY


def test_a_dead_process_is_a_crash_with_its_cause(
    workspace: Workspace, sleeper: subprocess.Popen[bytes]
) -> None:
    folder = make(workspace)
    pretend_running(folder, sleeper)
    (folder / records.LOG).write_text(
        "error: of before\n--- 2026 again ---\nerror: the disk is full\n", encoding="utf-8"
    )
    sleeper.kill()
    sleeper.wait()
    assert (seen(folder).state, seen(folder).cause) == ("crashed", "the disk is full")
    assert jobs.reap(workspace) == [folder.name]
    assert read_json(folder / records.RESULT)["code"] is None
    assert seen(folder).state == "crashed"


@pytest.mark.parametrize("start", [1795686836.0, None])
def test_a_worker_is_known_where_the_clock_was_set_since(
    workspace: Workspace, start: float | None
) -> None:
    """By its command line, which `start_worker` gives."""
    folder, other = make(workspace), make(workspace)
    words = [sys.executable, "-c", STAY, _WORKER_MODULE, f"elsewhere/{folder.name}"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        for job in (folder, other):
            write_json(job / records.WORKER, {"pid": child.pid, "start": start})
        assert seen(folder).state == "running"
        assert seen(other).state == "crashed", "the pid is another job's worker's now"
    finally:
        child.kill()
        child.communicate()
    assert seen(folder).state == "crashed"


@pytest.mark.parametrize(
    ("code", "state"), [(143, "stopped"), (130, "stopped"), (1, "failed"), (3, "failed")]
)
def test_the_exit_code_tells_how_a_job_ended(workspace: Workspace, code: int, state: str) -> None:
    folder = make(workspace)
    (folder / records.LOG).write_text("error: the loss is nan at step 3\n", encoding="utf-8")
    write_json(folder / records.RESULT, {"code": code})
    assert seen(folder).state == state
    assert seen(folder).cause == ("the loss is nan at step 3" if state == "failed" else "")


def test_exit_code_0_without_an_adapter_that_opens_is_not_done(workspace: Workspace) -> None:
    folder = make(workspace)
    write_json(folder / records.RESULT, {"code": 0})
    assert (seen(folder).state, seen(folder).cause) == (
        "failed",
        "the run ended without an adapter file",
    )
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"\0" * 40)
    assert seen(folder).state == "failed"
    assert "cannot be opened" in seen(folder).cause


def test_a_model_that_was_fine_tuned_itself_is_a_result_without_an_adapter(
    workspace: Workspace,
) -> None:
    folder = started_run(workspace, 3)
    (folder / "model").mkdir()
    (folder / "model" / "model_index.json").write_text("{}", encoding="utf-8")
    write_json(folder / records.RESULT, {"code": 0})
    job = seen(folder)
    assert (job.state, job.cause) == ("done", "")
    assert (job.stands, job.candidates) == ("", ())


def test_progress_and_time_left_come_from_measured_steps(workspace: Workspace) -> None:
    job = read_job(started_run(workspace, 4))
    assert job is not None
    assert (job.step, job.total, job.step_seconds, job.remaining_seconds) == (4, 10, 2.0, 12.0)
    assert job.trigger == "sks mug"


FILES = (records.JOB, records.SETTINGS, records.PROGRESS, records.RESULT, "metrics.jsonl")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_damages_its_run_alone(workspace: Workspace, name: str) -> None:
    good = started_run(workspace, 3)
    (before,) = snapshot(workspace.root)
    contents = {}
    for content in DAMAGES.values():
        folder = started_run(workspace, 2)
        write_json(folder / records.RESULT, {"code": 143})
        damage(folder / name, content)
        contents[folder] = content
    for job in snapshot(workspace.root):
        if job.folder == good:
            assert job == before
            continue
        content = contents[job.folder]
        assert job.has_ended
        if content or content is None or name != "metrics.jsonl":  # of a run without a step
            assert job.shown_state == "damaged"
            assert job.damage[0].startswith(f"{name} is damaged (")
            assert job.damage[0].endswith("; fix or delete it, or remove this run")
    assert jobs.waiting_jobs(workspace) == [good]
    for folder in contents:
        jobs.delete_job(workspace, folder.name)
        assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (records.JOB, '{"title": "sks mug"}', "arguments is missing"),
        (records.JOB, '{"arguments": ["train"], "title": ["a"]}', "title is \"\\['a'\\]\""),
        (records.JOB, '{"arguments": ["train"], "queued": NaN}', "queued is 'nan'"),
        (records.JOB, '{"arguments": ["dance"]}', "kind is 'dance', not train, export"),
        (records.JOB, '{"arguments": "train"}', "arguments is 'train'"),
        (records.JOB, '{"arguments": ["export"], "base": 3}', "base is '3'"),
        (records.JOB, '{"arguments": ["export", 1]}', "arguments.1 is '1'"),
        (records.SETTINGS, "max_train_steps: many\n", "max_train_steps is 'many'"),
        (records.SETTINGS, "- a\n", "must hold 'setting: value' lines"),
        (records.SETTINGS, "a: b: c\n", "line 1: this is not valid YAML"),
        (records.PROGRESS, '{"total_steps": "x"}', "total_steps is 'x'"),
        (records.RESULT, '{"code": "0"}', "code is '0'"),
        (records.RESULT, '{"code": true}', "code is 'True'"),
        ("metrics.jsonl", '{"step": 1, "loss": 1, "seconds": 1}\n{"step": 2}\n', "line 2 is no"),
        ("metrics.jsonl", '{"step": "1", "loss": 1, "seconds": 1}\n', "line 1 is not a record"),
        ("metrics.jsonl", '{"step": 1, "loss": NaN, "seconds": 1}\n', "line 1 is not a record"),
    ],
)
def test_the_damage_is_named(workspace: Workspace, name: str, text: str, reason: str) -> None:
    folder = started_run(workspace, 1)
    write_json(folder / records.RESULT, {"code": 143})
    (folder / name).write_text(text, encoding="utf-8")
    (line,) = seen(folder).damage
    assert re.search(reason, line)
    assert str(folder) not in line


def test_a_running_job_with_a_damaged_file_can_be_stopped(
    workspace: Workspace, sleeper: subprocess.Popen[bytes]
) -> None:
    folder = started_run(workspace, 1)
    pretend_running(folder, sleeper)
    (folder / records.PROGRESS).write_text("{", encoding="utf-8")
    assert (seen(folder).state, seen(folder).shown_state) == ("running", "running")
    assert "progress.json is damaged" in seen(folder).damage[0]


def test_a_damaged_result_is_mended_by_resuming(workspace: Workspace) -> None:
    folder = started_run(workspace, 1)
    (folder / records.RESULT).mkdir()
    (folder / records.RESULT / "x").touch()
    job = seen(folder)
    assert (job.state, job.shown_state, job.cause) == ("crashed", "damaged", "")
    jobs.requeue_job(folder)
    assert (seen(folder).state, seen(folder).damage) == ("waiting", ())
    (folder / records.JOB).write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"job\.json is damaged"):
        jobs.requeue_job(folder)


def _rename(folder: Path) -> None:
    record = records.read_record(folder)
    records.write_record(folder, dataclasses.replace(record, title="another"))


def _sample(name: str) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / name).touch()

    return add


def _append(name: str, text: str) -> Callable[[Path], None]:
    def append(folder: Path) -> None:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(text)

    return append


CHANGES: dict[str, Callable[[Path], object]] = {
    "title": _rename,
    "choice": lambda folder: choose(seen(folder), "checkpoint-2"),
    "checkpoint": lambda folder: remove_folder(folder / "checkpoint-4"),
    "adapter": lambda folder: os.remove(
        folder / "checkpoint-2" / "pytorch_lora_weights.safetensors"
    ),
    "samples": _sample("adapted.png"),
    "sample": _sample("step-2.png"),
    "metrics": _append("metrics.jsonl", '{"step": 9, "loss": 1, "seconds": 3}\n'),
    "settings": _append(records.SETTINGS, "token: new\n"),
    "progress": lambda folder: write_json(folder / records.PROGRESS, {"total_steps": 7}),
    "result": lambda folder: records.write_result(folder, records.JobResult(1)),
    "log": _append(records.LOG, "error: the disk is full\n"),
    "damage": lambda folder: damage(folder / records.PROGRESS, DAMAGES["word"]),
    "mending": lambda folder: write_json(folder / records.PROGRESS, {}),
    "resume": jobs.requeue_job,
}


def test_of_many_jobs_only_what_changed_is_read_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [ended_run(workspace, (2, 4), 4) for _ in range(20)]
    folder = runs[7].folder
    (folder / records.SETTINGS).write_text("max_train_steps: 4\n", encoding="utf-8")
    before = snapshot(workspace.root)
    opened = list[Path]()
    open_file = io.open

    def counting(path: Path, *args: object, **options: object) -> object:
        opened.append(Path(path))
        return open_file(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", counting)
    assert snapshot(workspace.root) == before
    assert opened == []
    for name, change in CHANGES.items():
        change(folder)
        opened.clear()
        now = snapshot(workspace.root)
        assert now != before, name
        assert {path.relative_to(folder).parts[0] for path in opened} >= {records.JOB}, name
        # As a new process, without a cache, reads them.
        monkeypatch.setattr(snapshots, "_ENDED", {})
        assert snapshot(workspace.root) == now, name
        before = now
    jobs.delete_job(workspace, runs[3].id)
    assert len(snapshot(workspace.root)) == len(runs) - 1
    assert {*snapshots._ENDED} == {run.folder for run in runs} - {runs[3].folder, folder}


def test_a_job_whose_output_was_deleted_is_not_done_any_more(workspace: Workspace) -> None:
    run = ended_run(workspace, (2,), 4)
    output = workspace.exports / "merged.safetensors"
    output.touch()
    folder = about(run.folder, "export", output=str(output))
    write_json(folder / records.RESULT, {"code": 0})
    assert [seen(folder).state for _ in range(2)] == ["done"] * 2
    output.unlink()
    assert (seen(folder).state, seen(folder).cause) == ("failed", "merged.safetensors is gone")
    output.touch()
    assert seen(folder).state == "done"
