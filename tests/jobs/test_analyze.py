"""Analyzing a run is a job."""

from __future__ import annotations

import html
import json
import shlex
from pathlib import Path

import pytest

from dora_diffusion.analysis import analyze_weights
from dora_diffusion.app.views.library import _errand
from dora_diffusion.cli import build_parser
from dora_diffusion.jobs import queue as jobs
from dora_diffusion.jobs.analyze import analysis_figures, analyze_command, start_analysis
from dora_diffusion.jobs.errors import RequestError
from dora_diffusion.jobs.records import AnalyzeRequest
from dora_diffusion.jobs.snapshot import read_job
from dora_diffusion.jobs.workspace import Workspace
from tests.jobs.helpers import done, job_of, make, seen, wait


def test_an_analysis_is_a_job_and_the_library_shows_it(finished: tuple[Workspace, str]) -> None:
    workspace, run = finished[0], job_of(finished)
    queue = jobs.JobQueue(workspace)
    job = wait(workspace, queue, start_analysis(workspace, run), done)
    queue.close()
    assert isinstance(job.request, AnalyzeRequest)
    output = Path(job.request.output)
    assert output.is_relative_to(workspace.exports)
    report = json.loads((output / "analysis.json").read_text(encoding="utf-8"))
    (change,) = analyze_weights(run.folder, run.base).runs
    (told,) = report["runs"]
    assert (told["name"], report["base"]) == (run.title, run.base)
    assert [c["step"] for c in told["checkpoints"]] == [c.step for c in change.checkpoints]
    assert told["checkpoints"][0]["delta_m"] == change.checkpoints[0].whole.mean("delta_m")
    layers = sum(len(c.layers) for c in change.checkpoints)
    assert (job.step, job.total) == (layers, layers)
    shown = html.unescape(_errand(job))
    assert f"layer {layers} of {layers}" in shown
    assert "layers.csv" in shown
    figures = analysis_figures(output)
    assert all(text in shown for pair in figures.items() for text in pair)
    last = change.checkpoints[-1].whole
    assert f"{last.relative_change:.2%}" in figures["change of the weights"]
    # The command says what the job did.
    command = analyze_command(workspace, job.request)
    assert command in shown
    words = shlex.split(command)[3:]
    args = build_parser().parse_args(words)
    assert (args.source, args.base) == ([str(run.folder)], run.base)
    # Without its files it is no result.
    output.rename(output.with_name("elsewhere"))
    assert analysis_figures(output) == {}
    assert (seen(job.folder).state, seen(job.folder).cause) == ("failed", "the analysis is gone")


def test_a_run_without_an_adapter_is_refused(workspace: Workspace) -> None:
    run = read_job(make(workspace))
    assert run is not None
    with pytest.raises(RequestError, match="no adapter yet"):
        start_analysis(workspace, run)
