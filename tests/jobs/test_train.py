"""A run is queued with a copy of its photos and settings, and resumes where it can."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_diffusion.config import TrainConfig, read_config_file
from dora_diffusion.jobs import records, train
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.queue import create_job, stop_job
from dora_diffusion.jobs.records import MergeRequest, ProgressFile, TrainRequest
from dora_diffusion.jobs.subjects import read_subject, save_caption
from dora_diffusion.jobs.workspace import Workspace, ids_in
from dora_diffusion.training import checkpoint, loop
from tests.jobs.helpers import ended_run, seen

CONFIG = TrainConfig(instance_prompt="a photo of a sks dog", class_word="dog", rank=3)


def start(workspace: Workspace, subject: str) -> Path:
    stored = read_subject(workspace, subject)
    return workspace.root / train.start_training(workspace, CONFIG, stored)


def test_a_run_has_its_own_photos_and_settings(workspace: Workspace, subject: str) -> None:
    folder = start(workspace, subject)
    job = seen(folder)
    assert job.request == TrainRequest(base="embedded:tiny-sd", subject=subject)
    assert (job.state, job.trigger) == ("waiting", "sks dog")
    photos = folder / "photos"
    assert [path.name for path in sorted(photos.iterdir())] == ["001.jpg", "002.jpg"]
    settings = TrainConfig.from_dict(read_config_file(folder / records.SETTINGS))
    assert (settings.output_dir, settings.instance_data_dir) == (str(folder), str(photos))
    assert settings.rank == 3


def test_a_run_is_named_by_hand_or_by_its_subject_and_the_time(
    workspace: Workspace, subject: str
) -> None:
    stored = read_subject(workspace, subject)
    first = seen(start(workspace, subject))
    assert re.fullmatch(r"Dog \d\d:\d\d", first.title)
    assert first.label == f"{first.title} · {first.made[5:10]}"
    config = dataclasses.replace(CONFIG, seed=1)
    folder = workspace.root / train.start_training(workspace, config, stored, " my  best dog ")
    named = seen(folder)
    assert named.label == f"my best dog · {named.made[5:]}"
    about = workspace.root / create_job(workspace, MergeRequest(run=named.id), "Merge my best dog")
    train.rename_run(workspace, named.id, "Rex")
    assert [seen(job).title for job in (folder, about)] == ["Rex", "Merge Rex"]
    assert seen(first.folder).title == first.title
    for name in ("", "x" * 61):
        with pytest.raises(RequestError, match="name"):
            train.rename_run(workspace, named.id, name)


def test_a_finished_run_is_queued_again_with_more_steps(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dora_diffusion.jobs.snapshot._unusable_result", lambda *_: "")
    job = ended_run(workspace, (4, 8), 8, code=0)
    for more in (0, 0.5, -1, None, "9", float("nan"), 1e9):
        with pytest.raises(RequestError, match="it must be between 1 and"):
            train.continue_run(job.folder, more)
    assert seen(job.folder) == job
    train.continue_run(job.folder, 4)
    again = seen(job.folder)
    assert (again.state, again.total, again.settings["max_train_steps"]) == ("waiting", 12, 12)
    assert again.record.resume
    changed = {name for name in job.settings if again.settings[name] != job.settings[name]}
    assert changed == {"max_train_steps"}
    for other in (again, ended_run(workspace, (4,), 8, code=0), ended_run(workspace, (8,), 8)):
        with pytest.raises(RequestError, match="only a finished run that kept a checkpoint"):
            train.continue_run(other.folder, 4)


def test_the_same_run_is_queued_once(workspace: Workspace, subject: str) -> None:
    folder, stored = start(workspace, subject), read_subject(workspace, subject)
    with pytest.raises(RequestError, match="is number 1 in the queue already; change a setting"):
        start(workspace, subject)
    assert ids_in(workspace.root) == [folder.name]
    train.start_training(workspace, dataclasses.replace(CONFIG, seed=7), stored)
    save_caption(workspace, subject, "001.jpg", "a photo of a sks dog on grass")
    start(workspace, subject)
    for job in ids_in(workspace.root):
        stop_job(workspace.root / job)
    start(workspace, subject)
    assert len(ids_in(workspace.root)) == 4


@pytest.mark.parametrize(
    ("resume", "checkpoints", "latest", "overwrite"),
    [(False, [], None, False), (True, [Path("checkpoint-2")], "latest", False),
     (True, [], None, True)],
)  # fmt: skip
def test_a_run_resumes_from_its_latest_checkpoint_or_begins_again(
    workspace: Workspace,
    subject: str,
    monkeypatch: pytest.MonkeyPatch,
    resume: bool,
    checkpoints: list[Path],
    latest: str | None,
    overwrite: bool,
) -> None:
    asked: list[TrainConfig] = []

    def fake(config: TrainConfig, on_event: Any) -> Any:
        asked.append(config)
        return SimpleNamespace(interrupted=resume)

    monkeypatch.setattr(loop, "train", fake)
    monkeypatch.setattr(checkpoint, "checkpoints_in", lambda folder: checkpoints)
    folder = start(workspace, subject)
    code = train.run_training(folder, resume, ProgressFile(folder))
    assert (asked[0].resume_from_checkpoint, asked[0].overwrite_output_dir) == (latest, overwrite)
    assert code == (143 if resume else 0)
    assert seen(folder).progress.device_name
