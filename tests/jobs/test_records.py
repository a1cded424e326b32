"""The files of a job: what one app writes, another reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_diffusion.jobs import records
from dora_diffusion.jobs.errors import DamagedFile
from dora_diffusion.jobs.loading import ModelFiles
from dora_diffusion.jobs.records import (
    AnalyzeRequest,
    CompareRequest,
    JobProgress,
    JobRecord,
    JobRequest,
    JobResult,
    MergeRequest,
    ProgressFile,
    PushRequest,
    TrainRequest,
    read_progress,
    read_record,
    read_result,
    write_record,
    write_result,
)


@pytest.mark.parametrize(
    "request_",
    [
        TrainRequest(base="b", subject="s", sample="bolt_mug"),
        MergeRequest("r", "b", "a.safetensors", "o.safetensors", 0.5, "sks mug", "v", "c"),
        CompareRequest("r", "b", ["checkpoint-1", "result"]),
        PushRequest("r", "ann/mug", private=False),
        AnalyzeRequest("r", "b", "exports/r/analysis", "fp16", "main"),
    ],
    ids=lambda request: request.kind,
)
def test_what_was_asked_for_is_read_back(tmp_path: Path, request_: JobRequest) -> None:
    record = JobRecord(request_, "sks mug", created=1.5, queued=2.5, resume=True)
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


def test_a_job_is_one_flat_object_as_runs_folders_have_it(tmp_path: Path) -> None:
    values = {
        "kind": "merge", "title": "Merge sks mug", "created": 1.0, "queued": 2.0, "resume": False,
        "base": "embedded:tiny-sd", "adapter": "a", "output": "o", "strength": 0.5,
        "run": "20261125-020304-abcdef", "trigger": "sks mug", "vae": None, "config": "c",
        "variant": None, "revision": "main",
    }  # fmt: skip
    (tmp_path / records.JOB).write_text(
        json.dumps(values | {"of_a_later_version": 1}), encoding="utf-8"
    )
    record = read_record(tmp_path)
    assert isinstance(record.request, MergeRequest)
    assert record.request.files == ModelFiles(None, "c", None, "main")
    assert (record.title, record.queued, record.request.strength) == ("Merge sks mug", 2.0, 0.5)
    write_record(tmp_path, record)
    assert json.loads((tmp_path / records.JOB).read_text(encoding="utf-8")) == values


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"kind": "dance"}', '{"kind": ["train"]}'])
def test_what_is_no_job_is_damaged(tmp_path: Path, text: str) -> None:
    with pytest.raises(DamagedFile, match=r"job\.json is damaged \(it is missing\)"):
        read_record(tmp_path)
    (tmp_path / records.JOB).write_text(text, encoding="utf-8")
    with pytest.raises(DamagedFile, match=r"job\.json is damaged \((it is no|kind is)"):
        read_record(tmp_path)


def test_a_result_tells_how_it_ended(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    write_result(tmp_path, JobResult(3, started=10.0, finished=12.5, peak_memory=1.25))
    result = read_result(tmp_path)
    assert result == JobResult(3, 10.0, 12.5, 1.25, None)
    assert result is not None
    assert result.seconds == 2.5
    assert JobResult(143, finished=5.0).seconds is None  # it never began


def test_progress_is_kept_and_not_written_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(records.time, "monotonic", lambda: now[0])
    assert read_progress(tmp_path) == JobProgress()
    note = ProgressFile(tmp_path)
    note(phase="merging", device_name="cpu")
    note(often=True, done=1, total=9)
    assert read_progress(tmp_path) == JobProgress("merging", "cpu")
    now[0] += 0.6
    note(often=True, done=2, total=9)
    assert read_progress(tmp_path) == JobProgress("merging", "cpu", done=2, total=9)
    note(done=9)
    assert read_progress(tmp_path).done == 9
    with pytest.raises(TypeError, match="percent"):
        note(percent=3)
