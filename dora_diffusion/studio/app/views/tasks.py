"""Cards of jobs that make something of runs: how they go, what runs, and what came of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from dora_diffusion.cli.settings import JOBS
from dora_diffusion.studio.app import html
from dora_diffusion.studio.jobs.logs import printed
from dora_diffusion.studio.jobs.snapshot import Job
from dora_diffusion.studio.jobs.workspace import read_json

_MOST = 6


def task_list(jobs: Sequence[Job]) -> str:
    """The newest of what was made of runs."""
    listed = {name for name, kind in JOBS.items() if kind.job and kind.job.is_listed}
    return "".join(map(task_card, [job for job in jobs if job.kind in listed][:_MOST]))


def task_card(job: Job) -> str:
    """A job with its command, and what it made once it is done."""
    card = html.status_card(job, stop=True)
    if job.state == "done":
        card += _result(job, Path(job.record.output))
    return card + html.command(job.record.command, "On the command line")


def _result(job: Job, output: Path) -> str:
    if job.kind == "analyze":
        return _analysis(output)
    if job.kind == "push":
        return html.outside(job.progress.address) if job.progress.address else ""
    if job.kind == "compare":
        return html.download(output / "report.html", "The report as one file")
    if job.kind == "prepare":
        return f"{_look(printed(job.folder))}<div>{html.image(output, 'Contact sheet')}</div>"
    files = [output, *(f for f in [output.with_suffix(".yaml")] if f.is_file())]
    link = "".join(html.download(file, f"Download {file.name}") for file in files)
    lines = [line.replace(str(output), output.name) for line in printed(job.folder)]
    kinds = ["warn" if "wrong: " in line else "info" for line in lines]
    return link + "".join(map(html.note, lines, kinds))


def _look(lines: Sequence[str]) -> str:
    """Return a command's report on photos: its Markdown table as HTML, and its cautions."""
    rows = [line.strip("| ").split("|") for line in lines if line.startswith("| ")]
    table = "".join(
        f"<tr>{''.join(f'<{cell}>{html.esc(text.strip())}</{cell}>' for text in row)}</tr>"
        for row, cell in zip(rows, ["th", *["td"] * len(rows)], strict=False)
    )
    cautions = [line for line in lines if line.startswith(("caution: ", "skipped: "))]
    notes = html.notes((line.partition(": ")[2] for line in cautions), "warn")
    return f"<div class='dd-table'><table>{table}</table></div>{notes}"


def _analysis(folder: Path) -> str:
    """Return the findings of an analysis, its plots and its files."""
    from dora_diffusion.lab.analysis.plots import FILES as PLOTS
    from dora_diffusion.lab.analysis.report import FILES

    files = [path for name in FILES.values() if (path := folder / name).is_file()]
    plots = "".join(html.image(folder / name, what) for what, name in PLOTS.items())
    links = "".join(html.download(path, path.name) for path in files)
    return f"{html.definitions(figures(folder))}<div class='dd-figures'>{plots}</div>{links}"


def figures(folder: Path) -> dict[str, str]:
    """Return the findings of a run's analysis, in words; nothing where its file is gone."""
    from dora_diffusion.lab.analysis.report import FILES

    file = folder / FILES["analysis"]
    return dict(_figures(file, file.stat().st_mtime_ns)) if file.is_file() else {}


@functools.lru_cache(maxsize=64)
def _figures(file: Path, modified: int) -> Mapping[str, str]:
    """Read once for each time it was written: the page asks every second."""
    from dora_diffusion.evaluation.statistics import Interval
    from dora_diffusion.lab.analysis.report import shown

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
