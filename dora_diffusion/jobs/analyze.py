"""The job of analyzing: what ``dora-diffusion analyze`` does, for all checkpoints of a run."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path

from dora_diffusion.console.shell import shown_command
from dora_diffusion.jobs.checkpoints import chosen_adapter
from dora_diffusion.jobs.exports import file_name
from dora_diffusion.jobs.loading import ModelFiles
from dora_diffusion.jobs.queue import create_job
from dora_diffusion.jobs.records import AnalyzeRequest, ProgressFile
from dora_diffusion.jobs.snapshot import Job, read_run
from dora_diffusion.jobs.workspace import Workspace, read_json


def start_analysis(workspace: Workspace, run: Job) -> str:
    """Queue a job that says what a run did to its base's weights. Returns its id.

    Raises:
        RequestError: If the run has no adapter.
    """
    chosen_adapter(run)
    files = ModelFiles.of(run.settings)
    request = AnalyzeRequest(
        run=run.id,
        base=run.base,
        output=str(workspace.exports / run.id / file_name(run, "analysis")),
        variant=files.variant,
        revision=files.revision,
    )
    return create_job(workspace, request, f"Analyze {run.title}")


def analyze_command(workspace: Workspace, request: AnalyzeRequest) -> str:
    """The command that analyzes as the job does."""
    words = [str(workspace.root / request.run), "--base", request.base, "--output", request.output]
    words += ModelFiles(variant=request.variant, revision=request.revision).flags
    return shown_command([["python", "-m", "dora_diffusion", "analyze", *words]])


def run_analysis(workspace: Workspace, request: AnalyzeRequest, note: ProgressFile) -> None:
    """Analyze, counting layers; what was written of the run before is replaced as a whole."""
    from dora_diffusion.analysis import analyze_weights
    from dora_diffusion.analysis.plots import write_plots

    run, output = read_run(workspace, request.run), Path(request.output)
    note(phase="comparing weights")

    def show(done: int, total: int) -> None:
        note(often=done < total, done=done, total=total)

    analysis = analyze_weights(
        run.folder,
        request.base,
        variant=request.variant,
        revision=request.revision,
        on_progress=show,
    )
    # Its folder is called by its id; people know it by its title.
    runs = [dataclasses.replace(change, name=run.title) for change in analysis.runs]
    analysis = dataclasses.replace(analysis, base=request.base, runs=runs)
    shutil.rmtree(output, ignore_errors=True)
    analysis.write(output)
    write_plots(analysis, output)
    print(output)


def analysis_figures(folder: Path) -> dict[str, str]:
    """What an analysis of one run found, in words; nothing where its file is gone."""
    from dora_diffusion.analysis.report import FILES

    file = folder / FILES["analysis"]
    return dict(_figures(file, file.stat().st_mtime_ns)) if file.is_file() else {}


@functools.lru_cache(maxsize=64)
def _figures(file: Path, modified: int) -> Mapping[str, str]:
    """Read once for each time it was written: the page asks every second."""
    from dora_diffusion.analysis.report import shown
    from dora_diffusion.evaluation.statistics import Interval

    try:
        (run,) = read_json(file)["runs"]
        last, interval = run["checkpoints"][-1], run["correlation"]
        most = max(last["groups"], key=lambda group: group["share"])
        change = f"{last['relative_change']:.2%} of them, at the last checkpoint"
        return {
            "direction changes with magnitude": f"r = {shown(interval and Interval(**interval))}",
            "change of the weights": change,
            "effective rank of the change": f"{last['effective_rank']:.1f}, median over layers",
            "most of it in": f"{most['place']}, {most['kind']}: {most['share']:.0%}",
        }
    except (AttributeError, LookupError, TypeError, ValueError):
        return {"figures": f"{file.name} is damaged; analyze again"}
