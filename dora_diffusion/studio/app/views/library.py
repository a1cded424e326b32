"""The Library tab: adapters, their export, and jobs that process them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.cli.commands.adapters import where_it_works
from dora_diffusion.config.command import AsJob, CommandSettings
from dora_diffusion.config.wording import counted
from dora_diffusion.data.images import open_photo
from dora_diffusion.data.photos import photos_in
from dora_diffusion.formats.adapter.inspect import numbers
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context
from dora_diffusion.studio.app.html import task_list
from dora_diffusion.studio.app.settings import PROMPT_LIMIT
from dora_diffusion.studio.app.views import gallery, ui
from dora_diffusion.studio.app.views.request import UNSET, make_request
from dora_diffusion.studio.app.views.results import DEVICE, on_step, pair_slider
from dora_diffusion.studio.jobs import tasks
from dora_diffusion.studio.jobs.deletions import run_question
from dora_diffusion.studio.jobs.image_store import kept_thumbnail
from dora_diffusion.studio.jobs.queue import delete_job, stop_job
from dora_diffusion.studio.jobs.records import FORMS, IMPORT
from dora_diffusion.studio.jobs.snapshot import Job, chosen_adapter
from dora_diffusion.studio.jobs.store import GONE, REMAINS, UserError
from dora_diffusion.studio.jobs.tasks import MOST_STARS
from dora_diffusion.studio.jobs.uploads import MAX_FILE

_NOTHING = html.empty(
    "The library is empty", "A run appears here when it is done. Start one in the Train tab."
)
_GONE = html.empty("No run is chosen", "The run that was chosen was deleted; choose another one.")
_THUMBNAIL = 256
# Labels of the fields for choosing a run.
_RUN, _OTHER, _RIVAL = "Run", "Another adapter", "Compare with"


class LibraryTab:
    """Fields of the tab."""

    def __init__(self, context: Context) -> None:
        def list_page(query: Any) -> dict[str, Any]:
            return page_of(context, query)

        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                ui.html_block(html.heading("6", "Library", "Everything you have trained."))
                self.gallery = ui.html_block(
                    elem_id="library", js_on_load=gallery.SCRIPT, server_functions=[list_page]
                )
                self.run = ui.id_dropdown(label=_RUN, elem_id="library-run")
                self.details = ui.html_block(_NOTHING, elem_id="library-facts")
                self._add_import()
            with gr.Column(scale=5, min_width=320, visible=False) as self.side:
                self._add_notes()
                self._add_export()
                self.buttons: dict[str, tuple[Any, list[Any]]] = {}
                self.other = ui.id_dropdown(label=_OTHER, elem_id="other-adapter", render=False)
                self._add_comparison()
                for name, (kind, job) in FORMS.items():
                    self._add_task(name, kind, job)
                self.tasks = ui.html_block(elem_id="tasks", js_on_load=ui.CLICKS)
                self._add_delete()

    def _add_import(self) -> None:
        with gr.Accordion("Import an adapter made elsewhere", open=False):
            text = (
                "A .safetensors file of kohya's scripts, ComfyUI, PEFT, Diffusers or another "
                "trainer. It is kept as it is, and can be used like a run of yours."
            )
            ui.html_block(html.quiet(text))
            self.file = gr.File(
                label=f"Adapter, up to {MAX_FILE // 2**30} GB", file_types=[".safetensors"],
                height=150, elem_id="import-file",
            )  # fmt: skip
            self.base = ui.line(
                "Base model it was trained on", "import-base",
                placeholder="default: the model named in the file, or the first of its family",
            )  # fmt: skip
            self.imported = ui.html_block(elem_id="import-said")

        with gr.Accordion("Extract an adapter from a fine-tuned model", open=False):
            text = "The adapter that is nearest to the changes of fine-tuning, with its distance."
            ui.html_block(html.quiet(text))
            hint = "a Diffusers folder, hub id or .safetensors file"
            self.tuned = ui.line("Fine-tuned model", "extract-tuned", placeholder=hint)
            self.tuned_base = ui.line("Its base model", "extract-base", placeholder=hint)
            self.tuned_rank = ui.line("Largest rank", "extract-rank", "32")
            self.extract = ui.button("Extract", "extract")

    def _add_notes(self) -> None:
        with gr.Accordion("Name, stars and note", open=False):
            with gr.Row(elem_classes="dd-tool-row"):
                limit = tasks.NAME_LIMIT
                self.name = ui.line("New name", "library-name", max_length=limit)
                self.rename = ui.button("Rename it", "library-rename")
            stars = [("none", 0), *(("★" * count, count) for count in range(1, MOST_STARS + 1))]
            self.shown = gr.State("")
            self.stars = gr.Radio(stars, value=0, label="Stars", elem_id="library-stars")
            self.note = gr.Textbox(
                label="Note", lines=2, max_length=tasks.MOST_TEXT, elem_id="library-note",
                info="Kept as you type: which prompts it is good at, at what strength.",
            )  # fmt: skip

    def _add_export(self) -> None:
        ui.html_block(html.heading("", "Export", "An adapter for your program, or one model."))
        self.target = gr.Dropdown(
            [(title, name) for name, title in tasks.targets().items()],
            value=next(iter(tasks.targets())),
            label="Program",
            info="It gets the file that it needs of this adapter, with a line on what that costs.",
            elem_id="format",
        )
        [strength] = (one for one in tasks.ConvertSettings.settings() if one.name == "strength")
        self.strength = ui.setting_field(strength, strength.default, "Strength of the file")
        self.convert = ui.button("Prepare the download", "convert", variant="primary", size="lg")
        self.files = ui.html_block(elem_id="files")

    def _add_comparison(self) -> None:
        with gr.Accordion("Compare two adapters", open=False):
            text = "An image of each at one seed: left this run, right the other one."
            ui.html_block(html.quiet(text))
            self.rival = ui.id_dropdown(label=_RIVAL, elem_id="rival")
            self.prompt = gr.Textbox(
                "a photo of a {subject}", label="Prompt", max_length=PROMPT_LIMIT,
                elem_id="rival-prompt", info="{subject} becomes each run's own trigger words.",
            )  # fmt: skip
            self.seed = gr.Number(-1, precision=0, label="Seed", info="-1 is random.")
            self.compare = ui.button("Compare them", "rival-compare")
            self.pair = pair_slider("rival-slider")
            self.compared = ui.html_block(elem_id="rival-images")

    def _add_task(self, name: str, kind: type[CommandSettings], job: AsJob) -> None:
        """Add a button for a kind of job, with its fields."""
        with gr.Accordion(job.heading, open=False):
            ui.html_block(html.quiet(job.about))
            settings = [setting for setting in kind.settings() if setting.name in job.asked]
            names = [setting.name.replace("_", " ").capitalize() for setting in settings]
            used = [field.label for _, fields in self.buttons.values() for field in fields]
            # Labels must be unique, because the browser's draft uses them as keys.
            labels = [f"{name}, to {job.verb.lower()}" if name in used else name for name in names]
            fields = [self.other] if job.with_other else []
            if job.with_other:
                self.other.render()
            fields += [
                ui.setting_field(setting, setting.default, label)
                for setting, label in zip(settings, labels, strict=True)
            ]
            button = ui.button(job.verb, name)
        self.buttons[name] = button, fields

    def _add_delete(self) -> None:
        with gr.Accordion("Delete", open=False):
            text = (
                "Deletes the run with its adapter, checkpoints, samples, exports and copies of the "
                "photos. It cannot be restored. Files that a program has open are deleted at the "
                "next start of the app."
            )
            ui.html_block(html.quiet(text))
            self.delete = ui.button("Delete this run", "delete", variant="stop")


def connect(context: Context, tab: LibraryTab) -> None:
    """Connect the fields to their actions."""
    workspace = context.workspace

    def choose(event: gr.EventData) -> Any:
        _, job_id = ui.clicked(event)
        return job_id if job_id in {job.id for job in _listed(context.jobs())} else gr.skip()

    def show(job_id: str | None, before: str) -> list[Any]:
        if not job_id or job_id == GONE:
            return [_GONE if job_id else _NOTHING, "", 0, "", gr.skip(), ""]
        job = context.job(job_id)
        name, stored = gr.update(placeholder=job.title), [job.record.stars, job.record.note]
        # The user may be typing them, or have typed them before the page was reloaded.
        is_typed = job_id == before or not (before or any(stored))
        return [_facts(job), "", *([gr.skip()] * 2 if is_typed else stored), name, job_id]

    def delete(job_id: str) -> list[Any]:
        context.generator.release()  # Windows deletes no model that is mapped into memory.
        text = "Deleted" + ("" if delete_job(workspace, job_id) else REMAINS)
        updates = refresh(context.jobs(fresh=True), job_id)
        lists = [ui.filled(updates[name]) for name in ("library", "library_run")]
        return [*lists, html.note(text, "info")]

    def task(command: str) -> Callable[..., str]:
        """Return the handler of a button that starts a job for the displayed run."""

        def run(job_id: str | None, *values: Any) -> str:
            if command == "push" and context.launch.is_open:
                raise UserError(
                    "a shared app does not publish, because that would use its operator's account; "
                    "download the adapter instead"
                )
            arguments = list(values)
            if command == "convert":
                tasks.start_conversion(workspace, context.job(job_id, _RUN), *arguments)
            else:
                if FORMS[command][1].with_other and arguments[0]:
                    arguments[0] = context.job(arguments[0], _OTHER)
                tasks.start_task(command, workspace, context.job(job_id, _RUN), *arguments)
            return html.task_list(context.queued(), job_id)

        return run

    def card(job_id: str | None) -> str:
        if context.job(job_id, _RUN).kind == IMPORT:  # An imported adapter has no settings.
            return ""
        return html.download(tasks.write_card(workspace, context.job(job_id)), "Model card")

    ui.on(tab.gallery.click, choose, None, [tab.run])
    outputs = [tab.details, tab.files, tab.stars, tab.note, tab.name, tab.shown]
    ui.on(tab.run.change, show, [tab.run, tab.shown], outputs)
    question = functools.partial(run_question, workspace)
    ui.on(tab.delete.click, delete, [tab.run], [tab.gallery, tab.run, tab.files], confirm=question)
    ui.on(tab.convert.click, card, [tab.run], [tab.files])
    buttons = {"convert": (tab.convert, [tab.target, tab.strength]), **tab.buttons}
    for command, (button, fields) in buttons.items():
        ui.on(button.click, task(command), [tab.run, *fields], [tab.tasks], show="minimal")
    for connect_part in (_connect_comparison, _connect_thoughts, _connect_intake):
        connect_part(context, tab)


def _connect_comparison(context: Context, tab: LibraryTab) -> None:
    """Connect the comparison of two adapters on the same image."""

    def compare(
        run: str | None,
        rival: str | None,
        prompt: str,
        seed: Any,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        if not rival or rival == run:
            raise UserError("choose another adapter to compare with; there must be two of them")
        pair = ((run, _RUN), (rival, _RIVAL))
        names = [context.job(job_id, field).title for job_id, field in pair]
        form = {**UNSET, "prompt": prompt, "seed": seed}
        left, right = (make_request(context, job_id, form) for job_id in (run, rival))
        images = context.generator.make(left, on_step(progress))
        images += context.generator.make(replace(right, seed=images[0].seed), on_step(progress))
        links = [
            html.download(image.path, f"{side}: {name}, seed {image.seed}")
            for side, name, image in zip(("Left", "Right"), names, images, strict=True)
        ]
        notes = html.notes(dict.fromkeys(line for image in images for line in image.notes), "warn")
        paths = tuple(str(image.path) for image in images)
        return [gr.update(value=paths, visible=True), notes + html.pieces.joined(links)]

    inputs = [tab.run, tab.rival, tab.prompt, tab.seed]
    ui.on(
        [tab.compare.click, tab.prompt.submit], compare, inputs, [tab.pair, tab.compared], **DEVICE
    )


def _connect_thoughts(context: Context, tab: LibraryTab) -> None:
    """Connect a run's name, stars and note."""
    workspace = context.workspace

    def annotate(job_id: str | None, displayed: str, stars: Any, note: Any) -> None:
        if job_id and job_id == displayed:  # else the fields belong to another run
            tasks.annotate_run(workspace, job_id, note, stars)

    def rename(job_id: str | None, name: str) -> list[Any]:
        tasks.rename_run(workspace, job_id, name)
        updates = refresh(context.jobs(fresh=True), job_id)
        lists = [ui.filled(updates[name]) for name in ("library", "library_run")]
        return [*lists, _facts(context.job(job_id)), gr.update(value="", placeholder=name)]

    named = [tab.rename.click, tab.name.submit]
    renamed = [tab.gallery, tab.run, tab.details, tab.name]
    ui.on(named, rename, [tab.run, tab.name], renamed)
    ui.on(
        [tab.stars.change, tab.note.change], annotate, [tab.run, tab.shown, tab.stars, tab.note],
        trigger_mode="always_last", concurrency_limit=1, concurrency_id="notes",
    )  # fmt: skip


def _connect_intake(context: Context, tab: LibraryTab) -> None:
    """Connect the ways to add adapters: upload, extraction, or another job's output."""
    workspace = context.workspace

    def take(file: str | None, base: str) -> list[Any]:
        if not file:
            return [gr.skip()] * 4
        run = tasks.import_adapter(
            workspace, Path(file), "", str(base or "").strip(), context.allowed_model
        )
        return [None, *added(run)]

    def extract(job_id: str | None, base: str, tuned: str, rank: str) -> str:
        if not (base or "").strip() or not (tuned or "").strip():
            raise UserError("name the fine-tuned model and its base model first")
        models = context.allowed_model(base), context.allowed_model(tuned)
        tasks.start_extraction(workspace, *models, rank)
        return html.task_list(context.queued(), job_id)

    def press(run_id: str | None, event: gr.EventData) -> list[Any]:
        """Stop a job, or add its output to the library."""
        action, job_id = ui.clicked(event)
        if action != "add":
            stop_job(workspace.job(job_id))
            return [html.task_list(context.jobs(fresh=True), run_id), *[gr.skip()] * 3]
        job = context.job(job_id)
        if job.state != "done" or not html.is_adapter(job):
            raise UserError("this job has made no adapter")
        verb, _, about = job.title.partition(" ")
        name = f"{about[: tasks.NAME_LIMIT - 12]}, {verb.lower().rstrip('e')}ed"
        file = Path(job.record.output)
        run = tasks.import_adapter(workspace, file, name, job.base, context.allowed_model)
        return [gr.skip(), *added(run)]

    def added(run: str) -> list[Any]:
        updates = refresh(context.jobs(fresh=True), run)
        message = html.note(f"{context.job(run).title} is in the library", "good")
        selection = gr.update(**updates["library_run"][0], value=run)
        return [message, ui.filled(updates["library"]), selection]

    outputs = [tab.file, tab.imported, tab.gallery, tab.run]
    ui.on(tab.file.upload, take, [tab.file, tab.base], outputs, show="minimal")
    ui.on(tab.tasks.click, press, [tab.run], [tab.tasks, tab.imported, tab.gallery, tab.run])
    tuned = [tab.run, tab.tuned_base, tab.tuned, tab.tuned_rank]
    ui.on(tab.extract.click, extract, tuned, [tab.tasks], show="minimal")


def _listed(jobs: Sequence[Job]) -> list[Job]:
    """Return the runs with an adapter, resumed runs included."""
    return [job for job in jobs if job.stands]


def refresh(
    jobs: Sequence[Job], run_id: str | None, more: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Return the timer's update of this tab; ``more`` are further choices by name."""
    runs = _listed(jobs)
    # A new stamp makes the page request the cards again (gallery.js).
    stamp = zlib.crc32(repr([(job.id, _card_text(job)) for job in runs]).encode())
    count = html.pieces.count(counted(len(runs), "run"), stamp)
    value = run_id or next((job.id for job in runs), None)
    selected = [job.id for job in runs if job.id == value]
    choices = [(f"{_starred(job, job.label)} · {job.shown_state}", job.id) for job in runs]
    cards = task_list(jobs, value)
    return {
        "library": count if runs else "",
        "library_run": ui.choosing(choices, run_id, value, visible=bool(runs)),
        **{
            name: ui.choosing([c for c in choices if c[1] != value], more.get(name), known=selected)
            for name in ("library_other", "library_rival")
        },
        "library_side": ui.changing(visible=bool(runs or cards)),
        "tasks": cards,
    }


def page_of(context: Context, query: object) -> dict[str, Any]:
    """Return a page of runs as cards; query and result are as in `gallery.page_of`."""
    runs = _listed(context.jobs())
    listed = runs[gallery.asked_for(query)]
    cards = []
    for job in listed:
        source = _image(job)
        path = context.workspace.thumbnails / f"{job.id}.jpg"
        small = kept_thumbnail(source, path, _thumbnail) if source else None
        reason = "damaged" if source else "no image"
        cards.append(html.image_card(small, "show", job.id, _card_text(job), reason))
    return {"cards": "".join(cards), "count": len(listed), "total": len(runs)}


def _card_text(job: Job) -> str:
    return f"{_starred(job)} · {job.shown_state}"


def _starred(job: Job, text: str = "") -> str:
    return f"{text or job.title} {'★' * min(MOST_STARS, job.record.stars)}".rstrip()


def _image(job: Job) -> Path | None:
    """Return a sample image of a run, else one of its photos, or None."""
    if job.samples:
        return job.samples[0]
    try:
        return next(iter(photos_in(job.folder / "photos")), None)
    except OSError:
        return None


def _thumbnail(path: Path) -> Any:
    """Return the top square of a photo, or of one image of a sheet (sizes are in its text)."""
    from dora_diffusion.data.sheets import one_image
    from dora_diffusion.sampling.images import parse_parameters, read_parameters

    image = open_photo(path, limited=False)
    text = read_parameters(path) if path.suffix == ".png" else None
    fields = parse_parameters(text) if text else {}
    size = fields.get("Last size", fields.get("Size", "")).split("x")
    if len(size) == 2 and all(side.isdecimal() for side in size):
        image = one_image(image, int(size[0]), int(size[1]))
    side = min(image.size)
    return image.crop((0, 0, side, side)).resize((_THUMBNAIL, _THUMBNAIL))


def _range(text: str) -> str:
    """Return a figure that is equal in all layers, or its range over layers."""
    values = numbers(text)
    if not isinstance(values, dict) or not values:
        return text
    least, most = min(values.values()), max(values.values())
    return f"{least:g} to {most:g}, by layer"


def _facts(job: Job) -> str:
    """Return the facts about a run's adapter file."""
    from dora_diffusion.export import inspect_adapter
    from dora_diffusion.sampling.images import adapter_name

    adapter = chosen_adapter(job)
    report = inspect_adapter(adapter)
    exact, wrong = where_it_works(report.tools)
    return html.pieces.adapter_card(
        job, html.state_pill(job), adapter_name(adapter), report, rank=_range(report.rank),
        alpha=_range(report.alpha),
        programs="; ".join([*exact, *([f"wrong in {wrong}"] if wrong else [])]),
    )  # fmt: skip
