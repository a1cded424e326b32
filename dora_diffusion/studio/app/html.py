"""HTML of the page's elements and of job cards; pieces.html has the markup."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined, Template

from dora_diffusion.config.wording import duration
from dora_diffusion.formats.adapter.metadata import split_triggers
from dora_diffusion.formats.files import runs
from dora_diffusion.numerics.devices import has_own_memory
from dora_diffusion.studio.app.settings import with_labels
from dora_diffusion.studio.jobs.estimates import Estimate
from dora_diffusion.studio.jobs.queue import PERSON, stop_asked
from dora_diffusion.studio.jobs.records import KINDS, log_warnings, printed, read_validation
from dora_diffusion.studio.jobs.snapshot import Job

_LAST_LINES = 6


@functools.cache
def template(name: str) -> Template:
    """Return a template of this folder, which escapes all text that is not from a template."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    filters = {"with_labels": with_labels, "duration": duration, "size": _size, "image": image}
    environment.filters |= filters
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    # A browser would show the line breaks between inline elements as spaces.
    return environment.from_string(re.sub(r"\n+(?=[<{])|(?<=[>}])\n+", "", text))


def _size(gib: float | None) -> str:
    if gib is None:
        return "not known yet"
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"


class _Pieces:
    """Macros of pieces.html: functions that return markup."""

    def __getattr__(self, name: str) -> Callable[..., str]:
        macro: Callable[..., str] = getattr(template("pieces.html").module, name)
        return macro


pieces = _Pieces()


def address(path: Any) -> str:
    """Return the URL of a file in a folder that the server may serve."""
    return f"gradio_api/file={quote(path.resolve().as_posix())}?{path.stat().st_mtime_ns}"


def image(path: Any, text: str) -> str:
    """Return an image that the server may serve; empty if the file does not exist."""
    return pieces.shown_image(address(path), text) if path.is_file() else ""


heading, empty, note, notes, quiet = (
    pieces.heading, pieces.empty, pieces.note, pieces.notes, pieces.quiet,
)  # fmt: skip
pill, button, command, log_view = pieces.pill, pieces.button, pieces.command, pieces.log_view


def image_card(path: Any, action: str, value: str, text: str, otherwise: str = "damaged") -> str:
    """Return an image with its name, clickable like a `button`; a placeholder if there is none."""
    content = image(path, "") if path else pieces.damaged_image(otherwise)
    return pieces.image_button(content, action, value, text)


def header(jobs: Sequence[Job] | None, problems: Sequence[str] = ()) -> str:
    """Return the name of the app, its active job (None: not known yet), and its problems."""
    active = next((job for job in jobs or () if job.is_active), None)
    waiting = sum(job.state == "waiting" for job in jobs or ())
    return pieces.header(jobs is not None, active, waiting, problems)


def state_pill(job: Job) -> str:
    words = {"running": KINDS[job.kind], "stopping": "saving and stopping"}
    return pill(words.get(job.shown_state, job.shown_state), job.shown_state)


def status_card(job: Job, *, stop: bool = False) -> str:
    """Return a card with state, progress, time left and errors; optionally with a stop button."""
    share = min(1.0, job.step / job.total) if job.total else float(job.state == "done")
    done = f"{job.progress.unit or 'step'} {job.step} of {job.total or '?'}"
    if job.progress.unit == "B":
        done = f"{job.step / 2**20:.1f} of {job.total / 2**20:.1f} MB"
    facts = [done] * (job.kind == "train" or bool(job.progress.unit)) + _live_facts(job)
    last = printed(job.folder)[-_LAST_LINES:] if job.cause else []
    triggers = split_triggers(job.trigger) if job.state == "done" and job.trigger else []
    return pieces.status_card(
        job, state_pill(job), share, facts, "\n".join(last), log_warnings(job.folder), triggers,
        stop=stop and not job.has_ended,
    )  # fmt: skip


def _live_facts(job: Job) -> list[str]:
    if job.state == "waiting":
        return [f"number {job.position} in the queue"]
    facts = []
    if losses := read_validation(job.folder):
        step, loss = list(losses.items())[-1]
        facts.append(f"held-out loss {loss:.4f} at step {step}")
    if job.kind == "train" and job.base:
        facts.append(job.trigger)
        base, device = Path(job.base), job.progress.device_name
        name = base.name if base.is_absolute() else job.base
        facts.append(f"{name} on {device}" if device else name)
    if job.is_active:
        facts.append(job.progress.phase or "starting")
        if job.remaining_seconds is not None and job.progress.phase == "training":
            facts.append(f"about {duration(job.remaining_seconds)} left")
        if stop_asked(job.folder) is not None:
            facts.append("asked to save and stop")
        requests = {runs.SAVE: "asked to save", runs.SAMPLE: "asked for sample images"}
        facts += [text for name, text in requests.items() if (job.folder / name).exists()]
    elif job.result and job.result.seconds is not None:
        facts.append(f"took {duration(job.result.seconds)}")
    if job.step_seconds is not None:
        facts.append(f"{job.step_seconds:.2f} s a step")
    return facts


def queue_list(jobs: Sequence[Job]) -> str:
    """Return a list of the newest jobs, one line each: state, title, position, owner and time."""
    return pieces.queue_list([(state_pill(job), job) for job in jobs[:12]], PERSON.get())


def estimate_card(value: Estimate, steps: int | None) -> str:
    """Return the card of an estimate, with its source, and a warning if the run will not fit."""
    return pieces.estimate(value, steps, has_own_memory(value.device.kind))


def download(path: Any, label: str) -> str:
    """Return a link to a file in a folder that the server may serve."""
    mib = path.stat().st_size / 2**20
    size = f"{mib:.1f} MB" if mib >= 0.1 else f"{mib * 1024:.1f} kB"
    return pieces.file_link(address(path), path.name, label, size)


def task_list(jobs: Sequence[Job], run_id: str | None) -> str:
    """Return cards of the newest jobs that process runs; ended ones only of the displayed run."""
    shown = [
        job
        for job in jobs
        if job.kind in ("export", "convert") and (not job.has_ended or job.record.run == run_id)
    ]
    return "".join(map(task_card, shown[:6]))


def task_card(job: Job) -> str:
    """Return a job's card with its command and, when done, its result."""
    card = status_card(job, stop=True)
    if job.state == "done":
        card += _result(job, Path(job.record.output))
    return card + command(job.record.command, "On the command line")


def _result(job: Job, output: Path) -> str:
    if job.kind == "prepare":
        return _look(printed(job.folder), image(output, "Contact sheet"))
    link = download(output, f"Download {output.name}")
    lines = [line.replace(str(output), output.name) for line in printed(job.folder)]
    kinds = ["warn" if "wrong: " in line else "info" for line in lines]
    return pieces.joined([link, *map(note, lines, kinds)])


def _look(lines: Sequence[str], sheet: str) -> str:
    """Return the report of ``prepare``: its Markdown table as HTML, its cautions and the sheet."""
    rows = [[text.strip() for text in line.strip("| ").split("|")] for line in lines
            if line.startswith("| ")]  # fmt: skip
    cautions = [
        line.partition(": ")[2] for line in lines if line.startswith(("caution: ", "skipped: "))
    ]
    return pieces.photo_report(rows, cautions, sheet)
