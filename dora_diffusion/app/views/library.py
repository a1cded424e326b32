"""The Library tab: what was made, and taking it away."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.app import html
from dora_diffusion.app.context import Context, plain
from dora_diffusion.app.views.fields import BUSY, CLICKS, QUIET, clicked, id_dropdown
from dora_diffusion.jobs.exports import (
    chosen_adapter,
    export_adapter,
    formats,
    merge_command,
    start_merge,
    start_push,
    write_card,
)
from dora_diffusion.jobs.queue import delete_job, stop_job
from dora_diffusion.jobs.snapshot import Job
from dora_diffusion.jobs.subjects import photos_in
from dora_diffusion.jobs.workspace import AppError

_NOTHING = html.empty(
    "The library is empty", "A run appears here when it is done. Start one in the Train tab."
)
_THUMBNAIL = 256
_ERRANDS = ("merge", "push")


@dataclass(frozen=True)
class LibraryTab:
    """The tab's fields that others use too."""

    gallery: Any
    run: Any
    facts: Any
    side: Any
    target: Any
    convert: Any
    files: Any
    strength: Any
    merge: Any
    repository: Any
    private: Any
    push: Any
    merges: Any
    delete: Any


def build(context: Context) -> LibraryTab:
    """Make the fields."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            gr.HTML(html.heading("6", "Library", "Everything you have trained."), padding=False)
            gallery = gr.Gallery(
                show_label=False,
                columns=3,
                height="auto",
                fit_columns=False,
                object_fit="contain",
                allow_preview=False,
                buttons=[],
                format="jpeg",
                elem_id="library",
            )
            run = id_dropdown(label="Run", elem_id="library-run")
            facts = gr.HTML(_NOTHING, padding=False, elem_id="library-facts")
        with gr.Column(scale=5, min_width=320, visible=False) as side:
            gr.HTML(
                html.heading("", "Export", "An adapter for your program, or one model."),
                padding=False,
            )
            target = gr.Dropdown(
                [(f"{name}: {text}", name) for name, text in formats().items()],
                value="diffusers",
                label="Adapter format",
                elem_id="format",
            )
            convert = gr.Button("Prepare the download", variant="primary", elem_id="convert")
            files = gr.HTML("", padding=False, elem_id="files")
            gr.HTML(
                "<p class='dd-quiet'>Or merge it into its base model: one file that every "
                "user interface reads.</p>",
                padding=False,
            )
            strength = gr.Slider(0, 2, 1, step=0.05, label="Merge strength")
            merge = gr.Button("Merge", size="md", elem_id="merge")
            with gr.Accordion("Publish on the Hugging Face hub", open=False):
                gr.HTML(
                    "<p class='dd-quiet'>Adapter, model card, settings, loss and samples; never "
                    "the photos. Needs HF_TOKEN in the environment that the app was started in."
                    "</p>",
                    padding=False,
                )
                repository = gr.Textbox(
                    label="Repository", placeholder="your-name/my-subject", max_lines=1,
                    max_length=200, elem_id="repository",
                )  # fmt: skip
                private = gr.Checkbox(True, label="Private: only you can see it")
                push = gr.Button("Publish", size="md", elem_id="push")
            merges = gr.HTML("", padding=False, elem_id="merges", js_on_load=CLICKS)
            with gr.Accordion("Delete", open=False):
                gr.HTML(
                    "<p class='dd-quiet'>Deletes the run with its adapter, checkpoints, "
                    "samples and exports. There is no way back.</p>",
                    padding=False,
                )
                delete = gr.Button("Delete this run", variant="stop", size="md", elem_id="delete")
    return LibraryTab(
        gallery, run, facts, side, target, convert, files, strength, merge, repository, private,
        push, merges, delete,
    )  # fmt: skip


def connect(context: Context, tab: LibraryTab) -> None:
    """Say what the fields do."""
    workspace = context.workspace

    @plain
    def choose(event: gr.SelectData) -> Any:
        ids = [job.id for job in _shelf(context.jobs())]
        return ids[event.index] if isinstance(event.index, int) and event.index < len(ids) else None

    @plain
    def show(job_id: str | None) -> list[Any]:
        if not job_id:
            return [_NOTHING, ""]
        return [_facts(context.job(job_id)), ""]

    @plain
    def convert(job_id: str | None, target: str) -> str:
        job = context.job(job_id)
        made = export_adapter(workspace, job, target)
        links = html.download(made.path, f"Download {made.path.name}")
        links += html.download(write_card(workspace, job), "Model card")
        return links + html.notes(made.facts, "info") + html.notes(made.cautions, "warn")

    @plain
    def merge(job_id: str | None, strength: float) -> str:
        start_merge(workspace, context.job(job_id), float(strength))
        context.queue.tick()
        return _merges(context.jobs(fresh=True))

    @plain
    def push(job_id: str | None, repository: str, private: bool) -> str:
        if context.launch.is_open:
            raise AppError(
                "a shared app does not publish, since that would be in the name of whoever runs "
                "it; download the adapter instead"
            )
        start_push(workspace, context.job(job_id), repository, private)
        context.queue.tick()
        return _merges(context.jobs(fresh=True))

    @plain
    def stop(event: gr.EventData) -> str:
        stop_job(workspace.job(clicked(event)[1]))
        return _merges(context.jobs(fresh=True))

    @plain
    def delete(job_id: str | None) -> list[Any]:
        if not job_id:  # not confirmed
            return [gr.skip()] * 3
        delete_job(workspace, str(job_id))
        jobs = context.jobs(fresh=True)
        parts = refresh(jobs, None)
        return [parts["shelf"][1](), parts["shelf_run"][1](), html.note("Deleted", "info")]

    tab.gallery.select(choose, None, [tab.run], **QUIET)
    tab.run.change(show, [tab.run], [tab.facts, tab.files], **QUIET)
    tab.convert.click(convert, [tab.run, tab.target], [tab.files], **BUSY)
    tab.merge.click(merge, [tab.run, tab.strength], [tab.merges], **BUSY)
    tab.push.click(push, [tab.run, tab.repository, tab.private], [tab.merges], **BUSY)
    tab.merges.click(stop, None, [tab.merges], **QUIET)
    tab.delete.click(
        delete,
        [tab.run],
        [tab.gallery, tab.run, tab.files],
        js="(id) => confirm('Delete this run with everything it made?') ? id : ''",
        **QUIET,
    )


def _shelf(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.can_generate and job.has_ended]


def refresh(jobs: Sequence[Job], chosen: str | None) -> dict[str, Any]:
    """What the clock sends to this tab."""
    shelf = _shelf(jobs)
    marks = tuple((job.id, job.state, _picture(job)) for job in shelf)
    ids = [job.id for job in shelf]
    value = chosen if chosen in ids else next(iter(ids), None)
    choices = [(f"{job.title} · {job.state} · {_when(job)}", job.id) for job in shelf]
    return {
        "shelf": (
            marks,
            lambda: gr.update(
                value=[
                    (_thumbnail(path), f"{job.trigger} · {job.state}")
                    for job in shelf
                    if (path := _picture(job))
                ],
                visible=bool(shelf),
            ),
        ),
        "shelf_run": (
            (choices, value),
            lambda: gr.update(choices=choices, value=value, visible=bool(shelf)),
        ),
        "shelf_side": (bool(shelf), lambda: gr.update(visible=bool(shelf))),
        "merges": _merges(jobs),
    }


def _picture(job: Job) -> Path | None:
    """A sample, else a photo: every run has photos."""
    if job.samples:
        return job.samples[0]
    return next(iter(photos_in(job.folder / "photos")), None)


@functools.lru_cache(maxsize=256)
def _thumbnail(path: Path) -> Any:
    """A photo's upper square, or one image of a sheet, whose text says how large they are."""
    from PIL import Image

    from dora_diffusion.images import parse_parameters, read_parameters
    from dora_diffusion.training.sheets import one_image

    text = read_parameters(path) if path.suffix == ".png" else None
    with Image.open(path) as file:
        image = file.convert("RGB")
    size = parse_parameters(text).get("Size", "").split("x") if text else []
    if len(size) == 2 and all(side.isdecimal() for side in size):
        image = one_image(image, int(size[0]), int(size[1]))
    side = min(image.size)
    return image.crop((0, 0, side, side)).resize((_THUMBNAIL, _THUMBNAIL))


def _when(job: Job) -> str:
    return f"{job.id[:4]}-{job.id[4:6]}-{job.id[6:8]} {job.id[9:11]}:{job.id[11:13]}"


def _facts(job: Job) -> str:
    """What a run has made, as its adapter file says it."""
    from dora_diffusion.export import inspect_adapter

    report = inspect_adapter(chosen_adapter(job))
    facts = {
        "trigger words": job.trigger,
        "base model": job.base,
        "method": f"{report.method}, rank {report.rank}, norm on the {report.norm_axis} axis",
        "layers": ", ".join(f"{count} {name}" for name, count in report.layers.items()),
        "steps": f"{job.step_of(job.stands)} of {job.total}",
        "size": f"{report.nbytes / 2**20:.1f} MB",
        "made": _when(job),
    }
    return (
        f"<div class='dd-card'><div class='dd-row'><h3>{html.esc(job.title)}</h3>"
        f"{html.state_pill(job)}</div><p></p>{html.definitions(facts)}"
        f"{html.notes(report.notes, 'info')}</div>"
    )


def _merges(jobs: Sequence[Job]) -> str:
    """Merging and publishing, with links to what is done."""
    return "".join(_errand(job) for job in [job for job in jobs if job.kind in _ERRANDS][:4])


def _errand(job: Job) -> str:
    card = html.status_card(job, stop=True)
    if job.kind == "push":
        address = str(job.progress.get("address") or "")
        return card + (html.outside(address) if job.state == "done" and address else "")
    output = Path(str(job.facts.get("output")))
    link = html.download(output, f"Download {output.name}") if job.state == "done" else ""
    return card + link + html.command(merge_command(job), "On the command line")
