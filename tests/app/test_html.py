"""Pieces of the page: escaped, and true."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dora_diffusion.app import html
from dora_diffusion.config import TrainConfig
from dora_diffusion.config.derived import as_yaml
from dora_diffusion.jobs import queue as jobs
from dora_diffusion.jobs import records
from dora_diffusion.jobs.logs import log_tail
from dora_diffusion.jobs.records import TrainRequest
from dora_diffusion.jobs.snapshot import read_job, snapshot
from dora_diffusion.jobs.workspace import Workspace, write_json
from tests.jobs.helpers import (
    started_run,
)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs").make()


def test_titles_are_escaped(workspace: Workspace) -> None:
    folder = started_run(workspace, 2, title="<img src=x onerror=alert(1)>")
    (folder / records.LOG).write_text("error: <script>alert(2)</script>\n", encoding="utf-8")
    write_json(folder / records.RESULT, {"code": 1})
    shown = snapshot(workspace.root)
    page = html.status_card(shown[0]) + html.queue_list(shown) + html.masthead(shown)
    page += html.log_view(log_tail(folder))
    assert "<img" not in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(2)" in page


def test_a_run_names_its_model_and_device_and_what_the_model_does_not_know(
    workspace: Workspace,
) -> None:
    settings = TrainConfig(max_train_steps=10, token="sks", class_word="dog")
    job_id = jobs.create_job(workspace, TrainRequest(), "sks dog", lambda folder: as_yaml(settings))
    folder = workspace.root / job_id
    write_json(folder / records.PROGRESS, {"phase": "training", "device_name": "NVIDIA X"})
    write_json(folder / records.RESULT, {"code": 143})

    def card() -> str:
        job = read_job(folder)
        assert job is not None
        return html.status_card(job)

    assert "embedded:tiny-sd on NVIDIA X" in card()
    assert "toy model of a drawn world" in card()
    (folder / records.SETTINGS).write_text(
        as_yaml(dataclasses.replace(settings, class_word="mugs")), encoding="utf-8"
    )
    assert "toy model" not in card()


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("train", "step 4 of 10"), ("merge", "1.5 of 3.0 MB"), ("compare", "image 3 of 6"),
     ("push", "commit 1 of 1"), ("analyze", "layer 7 of 90")],
)  # fmt: skip
def test_every_kind_of_job_has_its_unit(workspace: Workspace, kind: str, shown: str) -> None:
    folder = started_run(workspace, 4)
    facts = json.loads((folder / records.JOB).read_text(encoding="utf-8"))
    write_json(folder / records.JOB, facts | {"kind": kind})
    done = {"merge": (1.5 * 2**20, 3 * 2**20), "compare": (3, 6), "push": (1, 1)}
    done["analyze"] = (7, 90)
    if kind in done:
        write_json(folder / records.PROGRESS, dict(zip(("done", "total"), done[kind], strict=True)))
    job = read_job(folder)
    assert job is not None
    assert shown in html.status_card(job)


def test_durations_read_well() -> None:
    assert [html.duration(x) for x in (None, 0.4, 75, 3720)] == [
        "unknown", "0 s", "1 min 15 s", "1 h 2 min",
    ]  # fmt: skip
