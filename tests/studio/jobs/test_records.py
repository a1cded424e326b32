"""The files of a job: what one app writes, another reads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_diffusion.cli.main import COMMANDS
from dora_diffusion.studio.app import html
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.records import (
    JobProgress,
    JobRecord,
    ProgressFile,
    read_progress,
    read_record,
    write_record,
)
from dora_diffusion.studio.jobs.store import DamagedFile
from tests.waiting import Clock

RUN = "20261125-020304-abcdef"


def test_what_was_asked_for_is_read_back(tmp_path: Path) -> None:
    words = ["export", "--base", "b", "--output", "o"]
    record = JobRecord(words, "Merge it", RUN, "b", "o", "sks mug", "bolt_mug", "Ann", 1.5, 2.5)
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    values = json.loads((tmp_path / records.JOB).read_text(encoding="utf-8"))
    assert (values["kind"], values["arguments"]) == ("export", words)


def test_the_line_that_is_shown_is_the_arguments_and_what_the_worker_sets() -> None:
    words = ["push", "my run", "ann/it's", "--public"]
    shown = JobRecord(words).command
    assert shlex.split(shown) == ["python", "-m", "dora_diffusion", *words]
    assert JobRecord(words, base="embedded:tiny-sd").command == f"OMP_NUM_THREADS=1 {shown}"


STATES = {
    "train": "training", "export": "merging", "convert": "converting",
    "rank-checkpoints": "ranking", "prepare": "looking at photos",
}  # fmt: skip


@pytest.mark.parametrize("command", STATES)
def test_every_kind_of_job_is_a_command_that_the_page_knows(tmp_path: Path, command: str) -> None:
    assert records.KINDS == STATES
    write_record(tmp_path, JobRecord((command, "--json"), "Made of Dog"))
    assert read_record(tmp_path).kind == command
    job: Any = SimpleNamespace(kind=command, state="running", shown_state="running")
    assert f">{STATES[command]}<" in html.state_pill(job)
    assert command in COMMANDS


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"kind": "train"}', '{"arguments": []}', '{"arguments": [["train"]]}',
     '{"arguments": ["app", "--share"]}'],
)  # fmt: skip
def test_what_is_no_job_is_damaged(tmp_path: Path, text: str) -> None:
    with pytest.raises(DamagedFile, match=r"job\.json is damaged \(it is missing\)"):
        read_record(tmp_path)
    (tmp_path / records.JOB).write_text(text, encoding="utf-8")
    with pytest.raises(DamagedFile, match=r"job\.json is damaged \((it is no|kind is|arguments)"):
        read_record(tmp_path)


def test_progress_is_kept_and_not_written_too_often(
    tmp_path: Path, clock: Callable[..., Clock]
) -> None:
    time = clock(records)
    assert read_progress(tmp_path) == JobProgress()
    tell: Any = ProgressFile(tmp_path)
    tell(phase="merging", unit="B", device_name="cpu")
    tell(done=1, total=9)
    assert read_progress(tmp_path) == JobProgress("merging", "cpu", unit="B")
    time.now += 0.6
    tell(done=2, total=9)
    assert read_progress(tmp_path) == JobProgress("merging", "cpu", unit="B", done=2, total=9)
    tell(done=9, total=9)
    assert read_progress(tmp_path).done == 9
    with pytest.raises(TypeError, match="percent"):
        tell(percent=3)


def test_a_refresh_reads_with_a_reader_that_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = [], records.TypeAdapter
    monkeypatch.setattr(records, "TypeAdapter", lambda kind: made.append(kind) or real(kind))
    records._reader.cache_clear()
    write_record(tmp_path, JobRecord(["train"]))
    for _ in range(3):
        read_record(tmp_path)
        read_progress(tmp_path)
    assert made == [JobRecord, JobProgress]
