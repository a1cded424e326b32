"""Metrics and logs that are read while they grow."""

from __future__ import annotations

from pathlib import Path

from dora_diffusion.cli.console.errors import asking_for_report
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.records import (
    check_metrics,
    last_error,
    read_metrics,
    read_validation,
)
from dora_diffusion.studio.jobs.store import Workspace
from tests.studio.jobs.helpers import make, seen, started_run

METRICS = '{{"step": {step}, "loss": 0.{step}, "seconds": 2.0}}\n'


def test_a_half_written_line_is_not_read(workspace: Workspace) -> None:
    folder = started_run(workspace, 2)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(folder)] == [1, 2]


def test_what_was_held_out_is_read_apart_and_says_which_step_the_result_is_of(
    workspace: Workspace,
) -> None:
    folder = make(workspace, max_train_steps=3, validation_split=1, keep_best=True)
    lines = [
        '{"step": 0, "validation_loss": 0.3}\n', METRICS.format(step=1),
        '{"step": 1, "validation_loss": 0.2}\n', METRICS.format(step=2),
        '{"step": 2, "validation_loss": 0.25}\n', '{"step": 2, "validation_similarity": 0.8}\n',
        METRICS.format(step=3), '{"step": 3, "validation_loss": null}\n',
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    check_metrics(folder)
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3]
    assert read_validation(folder) == {0: 0.3, 1: 0.2, 2: 0.25}
    assert (seen(folder).step, seen(folder).step_of("result")) == (3, 3)
    # Of these losses, the run alone knows whose weights it still had.
    records.ProgressFile(folder)(result_step=2)
    assert (seen(folder).step, seen(folder).step_of("result")) == (3, 2)


def test_metrics_are_read_again_when_they_grow(workspace: Workspace) -> None:
    folder = started_run(workspace, 1)
    assert len(read_metrics(folder)) == 1
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(METRICS.format(step=2))
    assert len(read_metrics(folder)) == 2


def test_metrics_that_a_resumed_run_has_cut_are_read_anew(workspace: Workspace) -> None:
    folder = started_run(workspace, 5)
    assert len(read_metrics(folder)) == 5
    other = METRICS.replace("2.0", "9.0")
    lines = [METRICS.format(step=step) for step in (1, 2)]
    lines += [other.format(step=step) for step in (3, 4, 5, 6)]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert [record["seconds"] for record in read_metrics(folder)] == [2, 2, 9, 9, 9, 9]
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    assert read_metrics(folder) == ()


def test_a_defect_s_cause_asks_for_a_report_whoever_caught_it(tmp_path: Path) -> None:
    trace = 'Traceback (most recent call last):\n  File "a.py", line 1\nTypeError: a defect\n'
    cause = asking_for_report(TypeError("a defect"))
    for log in (trace, f"{trace}error: {cause}\n"):
        (tmp_path / records.LOG).write_text(
            f"--- 1 a ---\nerror: old\n--- 2 a ---\n{log}", encoding="utf-8"
        )
        assert last_error(tmp_path) == cause
