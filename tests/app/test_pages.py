"""Pieces of the page: escaped, and true."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from dora_diffusion.app import html
from dora_diffusion.app.estimates import estimate
from dora_diffusion.app.plot import loss_plot, smoothed
from dora_diffusion.app.settings import as_yaml
from dora_diffusion.config import TrainConfig
from dora_diffusion.jobs import queue as jobs
from dora_diffusion.jobs.snapshot import log_tail, read_job, read_metrics, snapshot
from dora_diffusion.jobs.workspace import AppError, Workspace, clean_text, ids_in, write_json
from dora_diffusion.memory import Device

METRICS = '{{"step": {step}, "loss": 0.{step}, "seconds": 2.0}}\n'


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs").make()


def run(workspace: Workspace, steps: int, title: str = "sks mug") -> Path:
    settings = TrainConfig(max_train_steps=10, token="sks", class_word="mug")
    job_id = jobs.create_job(workspace, "train", title, {}, lambda folder: as_yaml(settings))
    folder = workspace.root / job_id
    lines = "".join(METRICS.format(step=step) for step in range(1, steps + 1))
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return folder


def test_progress_and_time_left_come_from_measured_steps(workspace: Workspace) -> None:
    job = read_job(run(workspace, 4))
    assert job is not None
    assert (job.step, job.total, job.step_seconds, job.remaining_seconds) == (4, 10, 2.0, 12.0)
    assert job.trigger == "sks mug"


def test_a_half_written_line_is_not_read(workspace: Workspace) -> None:
    folder = run(workspace, 2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(folder)] == [1, 2]


def test_metrics_are_read_again_when_they_grow(workspace: Workspace) -> None:
    folder = run(workspace, 1)
    assert len(read_metrics(folder)) == 1
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(METRICS.format(step=2))
    assert len(read_metrics(folder)) == 2


def test_metrics_that_a_resumed_run_has_cut_are_read_anew(workspace: Workspace) -> None:
    folder = run(workspace, 5)
    assert len(read_metrics(folder)) == 5
    other = METRICS.replace("2.0", "9.0")
    lines = [METRICS.format(step=step) for step in (1, 2)]
    lines += [other.format(step=step) for step in (3, 4, 5, 6)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert [record["seconds"] for record in read_metrics(folder)] == [2, 2, 9, 9, 9, 9]
    (folder / "metrics.jsonl").write_text("")
    assert read_metrics(folder) == ()


def test_titles_are_escaped(workspace: Workspace) -> None:
    folder = run(workspace, 2, title="<img src=x onerror=alert(1)>")
    (folder / jobs.LOG).write_text("error: <script>alert(2)</script>\n")
    write_json(folder / jobs.RESULT, {"code": 1})
    shown = snapshot(workspace.root)
    page = html.status_card(shown[0]) + html.queue_list(shown) + html.masthead(shown)
    page += html.log_view(log_tail(folder))
    assert "<img" not in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(2)" in page


def test_a_progress_bar_shows_its_latest_state(workspace: Workspace) -> None:
    folder = run(workspace, 1)
    (folder / jobs.LOG).write_text("start\n\r 1%|a\r 2%|b\r 3%|c\ndone\n")
    assert log_tail(folder) == "start\n 3%|c\ndone"


def test_broken_files_do_not_break_the_page(workspace: Workspace) -> None:
    folder = run(workspace, 1)
    for name in (jobs.WORKER, jobs.RESULT, jobs.PROGRESS):
        (folder / name).write_text("{")
    assert len(snapshot(workspace.root)) == 1
    (folder / jobs.JOB).write_text("")
    assert snapshot(workspace.root) == ()


@pytest.mark.parametrize("name", ["notes", "20261125-020304-ABCDEF", ".new-20261125-020304-abcdef"])
def test_other_folders_are_no_jobs(workspace: Workspace, name: str) -> None:
    (workspace.root / name).mkdir()
    assert ids_in(workspace.root) == []


@pytest.mark.parametrize("job_id", ["..", "../subjects", "", None, 7, "20261125-020304-abcdef\n"])
def test_a_job_is_looked_up_by_its_id(workspace: Workspace, job_id: object) -> None:
    run(workspace, 1)
    with pytest.raises(AppError, match="no longer exists"):
        workspace.job(job_id)


def test_smoothing_starts_without_bias() -> None:
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    first, second = smoothed([1.0, 0.0], keep=0.5)
    assert (first, second) == pytest.approx((1.0, 1 / 3))


def test_the_plot_says_when_there_is_nothing() -> None:
    assert "No loss yet" in loss_plot([{"step": 1, "loss": 0.5}])


def test_the_plot_has_a_bounded_size_and_finite_points() -> None:
    records = [{"step": i, "loss": math.sin(i) ** 2} for i in range(1, 20_000)]
    drawn = loss_plot(records)
    assert len(drawn) < 30_000
    assert "nan" not in drawn
    assert "nan" not in loss_plot([{"step": i, "loss": 0.25} for i in range(1, 4)])


def test_estimates_are_measured_or_unknown(workspace: Workspace) -> None:
    folder = run(workspace, 4)
    write_json(folder / jobs.RESULT, {"code": 143, "peak_memory": 3.5})
    same, other = TrainConfig(max_train_steps=100), TrainConfig(train_batch_size=3)
    device = Device(free_gib=3.0)
    found = estimate(same, snapshot(workspace.root), workspace.root, device)
    assert (found.seconds, found.memory, found.runs) == (200.0, 3.5, 1)
    assert found.will_not_fit
    assert "This will not fit" in html.estimate_card(found, 10)
    unknown = estimate(other, snapshot(workspace.root), workspace.root, device)
    assert (unknown.seconds, unknown.memory, unknown.runs) == (None, None, 0)
    card = html.estimate_card(dataclasses.replace(unknown, seconds=60.0), 10)
    assert "Time is that of a run like this" in card
    assert "No run like this" not in card
    card = html.estimate_card(unknown, 10)
    assert "known after the first steps" in card
    assert "will not fit" not in card


def test_a_run_names_its_model_and_device_and_what_the_model_does_not_know(
    workspace: Workspace,
) -> None:
    settings = TrainConfig(max_train_steps=10, token="sks", class_word="dog")
    job_id = jobs.create_job(workspace, "train", "sks dog", {}, lambda folder: as_yaml(settings))
    folder = workspace.root / job_id
    write_json(folder / jobs.PROGRESS, {"phase": "training", "device_name": "NVIDIA X"})
    write_json(folder / jobs.RESULT, {"code": 143})

    def card() -> str:
        job = read_job(folder)
        assert job is not None
        return html.status_card(job)

    assert "embedded:tiny-sd on NVIDIA X" in card()
    assert "toy model of a drawn world" in card()
    (folder / jobs.SETTINGS).write_text(as_yaml(dataclasses.replace(settings, class_word="mugs")))
    assert "toy model" not in card()


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("train", "step 4 of 10"), ("merge", "1.5 of 3.0 MB"), ("compare", "image 3 of 6"),
     ("push", "commit 1 of 1")],
)  # fmt: skip
def test_every_kind_of_job_has_its_unit(workspace: Workspace, kind: str, shown: str) -> None:
    folder = run(workspace, 4)
    facts = json.loads((folder / jobs.JOB).read_text())
    write_json(folder / jobs.JOB, facts | {"kind": kind})
    done = {"merge": (1.5 * 2**20, 3 * 2**20), "compare": (3, 6), "push": (1, 1)}
    if kind in done:
        write_json(folder / jobs.PROGRESS, dict(zip(("done", "total"), done[kind], strict=True)))
    job = read_job(folder)
    assert job is not None
    assert shown in html.status_card(job)


def test_durations_read_well() -> None:
    assert [html.duration(x) for x in (None, 0.4, 75, 3720)] == [
        "unknown", "0 s", "1 min 15 s", "1 h 2 min",
    ]  # fmt: skip


def test_text_is_one_printable_line() -> None:
    assert clean_text(" a\tb\x07\u2028c ", 10, "prompt") == "a b c"
    with pytest.raises(AppError, match="at most 3"):
        clean_text("abcd", 3, "prompt")
