"""The page: header, five tabs, a footer, and the one clock that keeps them true."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import gradio as gr

from dora_diffusion.cli.console.environment import describe_environment
from dora_diffusion.cli.console.errors import explain_to_all
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.context import Context, Handler
from dora_diffusion.studio.app.views import compare, generate, library, run, subject, train, ui
from dora_diffusion.studio.app.views.request import MORE
from dora_diffusion.studio.jobs.store import UserError

TICK_SECONDS = 2.0
CHOOSERS = (
    "run", "adapter", "library_run", "study", "subject", *MORE, "find_run", "words_file", "style",
    "library_other", "library_rival", "study_subjects", "study_base", "others", "start", "base",
)  # fmt: skip
"""Fields over objects that come and go; a choice whose object is gone becomes `GONE`."""
_DAY = 24 * 3600
_READS = 3


def build_page(context: Context) -> gr.Blocks:
    """Build the app. Nothing in it holds state that the disk does not."""
    with gr.Blocks(
        title="DoRA studio", analytics_enabled=False, delete_cache=(3600, _DAY), fill_width=False
    ) as blocks:
        header = ui.html_block(html.header(None))
        with gr.Tabs() as tabs:
            # Tabs that are not rendered lose what is sent to them.
            with gr.Tab("Subject", id="subject", render_children=True):
                subjects = subject.SubjectTab()
            with gr.Tab("Train", id="train", render_children=True) as train_tab:
                training = train.TrainTab(context)
            with gr.Tab("Generate", id="generate", render_children=True):
                generating = generate.GenerateTab(context)
            with gr.Tab("Library", id="library", render_children=True):
                stored = library.LibraryTab(context)
            with gr.Tab("Compare", id="compare", render_children=True):
                comparing = compare.CompareTab(context)
        add_report(context)
        size = [training.model, training.advanced["resolution"]]
        restored = ui.keep_draft(blocks, {"class": training.class_word, "token": training.token})
        subject.connect(context, subjects, restored, size)
        train.connect(context, training, subjects, train_tab.select, restored)
        generate.connect(context, generating, restored)
        library.connect(context, stored)
        compare.connect(context, comparing)
        shown = training.shown
        ui.on(subjects.to_train.click, lambda: gr.Tabs(selected="train"), None, [tabs])
        # With the run that is shown, whatever was chosen there.
        chosen = [tabs, generating.adapter]
        ui.on(shown.to_generate.click, _open_with_run("generate"), [shown.run], chosen)
        ui.on(shown.to_library.click, _open_with_run("library"), [shown.run], [tabs, stored.run])
        # What a refresh may change, by the names that the tabs' functions use.
        fields = {
            "header": header, "run": shown.run, "status": shown.status, "loss": shown.loss,
            "log": shown.log, "jobs": shown.jobs, "samples": shown.samples, "now": shown.now,
            "stop": shown.stop, "kill": shown.kill, "resume": shown.resume, "remove": shown.remove,
            "next": shown.next, "extend": shown.extend, "details": shown.details,
            "chooser": shown.chooser, "chooser_start": shown.rank, "chooser_cards": shown.cards,
            "adapter": generating.adapter, **generating.more, "turn": generating.turn,
            "history": generating.gallery.list, "find_run": generating.gallery.run,
            "template": generating.template, "style": generating.fields["style"],
            "words": generating.words.kept, "words_row": generating.words.row,
            "words_file": generating.words.file,
            "library": stored.gallery, "library_run": stored.run,
            "library_other": stored.other, "library_rival": stored.rival,
            "library_side": stored.side, "tasks": stored.tasks,
            "study": comparing.study,
            "study_status": comparing.status, "study_report": comparing.report,
            "study_subjects": comparing.subjects, "study_delete": comparing.delete,
            "subject": subjects.pick, "looked": subjects.looked, "others": training.others,
            "base": training.model, "start": training.advanced["init_adapter"],
            "study_base": comparing.base,
        }  # fmt: skip
        _connect_clock(context, restored, fields)
    return blocks


def _open_with_run(tab: str) -> Callable[[str | None], list[Any]]:
    return lambda run_id: [gr.Tabs(selected=tab), run_id]


def _connect_clock(context: Context, restored: Any, fields: dict[str, Any]) -> None:
    """One timer, outside of the tabs, and the page's load refresh everything that can change.

    Text is sent by the clock itself. For every other field that an event may fill, Gradio rebuilds
    its configuration, changed or not, which took most of the time of a refresh: those are filled
    by an event of their own, when one of them has changed.
    """
    texts = {name: field for name, field in fields.items() if isinstance(field, gr.HTML)}
    others = {name: field for name, field in fields.items() if name not in texts}
    # What this page was last sent of each, and a mark of what the others should show.
    seen_texts, seen_others, mark = gr.State({}), gr.State({}), gr.State("")

    inputs = [fields[name] for name in CHOOSERS]

    def parts(*values: Any) -> Any:
        jobs, chosen = context.jobs(), dict(zip(CHOOSERS, values, strict=False))
        run_id, adapter, selected, study, picked = map(chosen.get, CHOOSERS[:5])
        made, problems = whole_tabs(
            Subject=lambda: subject.refresh(context, jobs, picked),
            Train=lambda: run.refresh(context, jobs, run_id) | train.refresh(context, jobs, chosen),
            Generate=lambda: generate.refresh(context, jobs, adapter, chosen),
            Library=lambda: library.refresh(jobs, selected, chosen),
            Compare=lambda: compare.refresh(context, jobs, study, chosen),
        )
        problems += [context.queue.problem] if context.queue.problem else []
        return {"header": html.header(jobs, problems), **made}

    again = functools.partial(read_again_if_deleted, context)

    @again
    def tick(known: dict[str, Any], *chosen: Any) -> list[Any]:
        now = parts(*chosen)
        marks = [now[name][0] for name in others if name in now]
        return [repr(marks), *_changes(known, now, texts)]

    @again
    def fill(known: dict[str, Any], *chosen: Any) -> list[Any]:
        return _changes(known, parts(*chosen), others)

    outputs = [mark, seen_texts, *texts.values()]
    clock = gr.Timer(TICK_SECONDS)
    ui.on(clock.tick, tick, [seen_texts, *inputs], outputs, trigger_mode="once")
    ui.on(restored.then, tick, [seen_texts, *inputs], outputs)
    filled = [seen_others, *others.values()]
    ui.on(mark.change, fill, [seen_others, *inputs], filled, trigger_mode="always_last")


def whole_tabs(**tabs: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return the tabs' content, and a line for each that fails and shows what it did before."""
    made: dict[str, Any] = {}
    problems = []
    for name, refresh in tabs.items():
        try:
            made |= refresh()
        except FileNotFoundError:
            raise  # see `read_again_if_deleted`
        except Exception as error:
            problems.append(f"{name} cannot be shown: {explain_to_all(error)}")
            _log_once(repr(error))
    return made, problems


@functools.lru_cache(maxsize=64)
def _log_once(error: str) -> None:
    """Log what is being handled; the clock comes upon it again and again."""
    traceback.print_exc(file=sys.stderr)


def read_again_if_deleted(context: Context, handler: Handler) -> Handler:
    """Make a refresh read again where a file that it was about to read is deleted meanwhile.

    The runs that it knows may be from before that, so they are listed again first.
    """

    @functools.wraps(handler)
    def run(*args: Any) -> Any:
        for _ in range(_READS - 1):
            try:
                return handler(*args)
            except FileNotFoundError:
                context.jobs(fresh=True)
        return handler(*args)

    return run  # type: ignore[return-value]


def _changes(known: dict[str, Any], now: dict[str, Any], names: Iterable[str]) -> list[Any]:
    """Return what the page has seen from now on, then each part that is new to it."""
    seen, updates = dict(known or {}), []
    for name in names:
        if name not in now:
            updates.append(gr.skip())
            continue
        part = now[name]
        mark = part[0] if isinstance(part, tuple) else part
        updates.append(ui.filled(part) if seen.get(name, _NEVER) != mark else gr.skip())
        seen[name] = mark
    return [seen, *updates]


_NEVER = object()


def add_report(context: Context) -> None:
    """Add the fields: the text is made when they are opened, which takes some seconds."""

    def describe() -> str:
        if context.launch.is_open:
            raise UserError(
                "a shared app does not describe the machine that it runs on; whoever runs it can "
                "call dora-diffusion doctor there"
            )
        return str(describe_environment(context.workspace.root))

    with gr.Accordion("For a bug report", open=False, elem_id="bug-report") as box:
        text = (
            "What this installation is, as dora-diffusion doctor prints it: no token, no password, "
            "no name of yours. Add the traceback, or the end of the run's log."
        )
        ui.html_block(html.quiet(text))
        # Without its label it has no button.
        report = gr.Textbox(
            label="This installation", lines=12, max_lines=40, interactive=False,
            placeholder="Looking ...", buttons=["copy"], elem_id="bug-report-text",
        )  # fmt: skip
    ui.on(box.expand, describe, None, [report], show="minimal")
