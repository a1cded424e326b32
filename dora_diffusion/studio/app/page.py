"""The page: header and four tabs, a timer that refreshes them, and what a reload restores.

The draft of all fields belongs to the user, not to the server: the browser stores it for all of its
windows. Captions and the words of a subject are stored separately (captions.js), because they
change with the photo or subject. The address belongs to one window, and names the open tab and the
selected objects.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from dora_diffusion.cli.console.errors import explain_to_all
from dora_diffusion.studio.app import html
from dora_diffusion.studio.app.api import add_api
from dora_diffusion.studio.app.context import Context, Handler
from dora_diffusion.studio.app.views import (
    generate,
    library,
    run,
    subject,
    train,
    ui,
)
from dora_diffusion.studio.app.views.request import MORE
from dora_diffusion.studio.app.views.request import choices as model_choices
from dora_diffusion.studio.jobs.store import GONE, ids_in

TICK_SECONDS = 2.0
CHOOSERS = (
    "run", "adapter", "library_run", "subject", *MORE, "others", "start", "base",
)  # fmt: skip
"""Fields for choosing objects; a choice whose object was deleted becomes `GONE`."""
_DAY = 24 * 3600
_READS = 3
_SHOWN = 256
_KINDS = (
    gr.Textbox, gr.Number, gr.Slider, gr.Checkbox, gr.CheckboxGroup, gr.Radio, gr.Dropdown,
)  # fmt: skip


def build_page(context: Context) -> gr.Blocks:
    """Build the page. All its state is on disk."""
    with gr.Blocks(
        title="DoRA studio", analytics_enabled=False, delete_cache=(3600, _DAY), fill_width=False
    ) as blocks:
        add_api(context)  # First: Gradio numbers later functions of the same name.
        header = ui.html_block(html.header(None))
        with gr.Tabs() as tabs:
            # Tabs lose updates until they are rendered.
            with gr.Tab("Subject", id="subject", render_children=True):
                subjects = subject.SubjectTab()
            with gr.Tab("Train", id="train", render_children=True) as train_tab:
                training = train.TrainTab(context)
            with gr.Tab("Generate", id="generate", render_children=True):
                generating = generate.GenerateTab(context)
            with gr.Tab("Library", id="library", render_children=True):
                stored = library.LibraryTab(context)
        preview = [training.model, *(training.advanced[n] for n in ("resolution", "masked_loss"))]
        run_view, words = training.shown, {"class": training.class_word, "token": training.token}
        address = _address(context, tabs, {
            "subject": subjects.pick, "run": run_view.run, "adapter": generating.adapter,
            "library": stored.run,
        })  # fmt: skip
        restored = keep_draft(blocks, words, address)
        subject.connect(context, subjects, restored, preview)
        train.connect(context, training, subjects, train_tab.select, restored)
        generate.connect(context, generating, restored)
        library.connect(context, stored)
        ui.on(subjects.to_train.click, lambda: gr.Tabs(selected="train"), None, [tabs])
        _connect_run(run_view, tabs, {"generate": generating.adapter, "library": stored.run})
        # The fields that a refresh may change, by their names in the tabs' `refresh`.
        fields = {
            "header": header, "run": run_view.run, "status": run_view.status,
            "loss": run_view.loss, "log": run_view.log, "jobs": run_view.jobs,
            "samples": run_view.samples, "now": run_view.now, "stop": run_view.stop,
            "kill": run_view.kill, "resume": run_view.resume, "remove": run_view.remove,
            "next": run_view.next, "extend": run_view.extend, "details": run_view.details,
            "chooser": run_view.chooser, "chooser_start": run_view.rank,
            "chooser_cards": run_view.cards,
            "adapter": generating.adapter, **generating.more, "turn": generating.turn,
            "history": generating.history,
            "library": stored.gallery, "library_run": stored.run,
            "library_side": stored.side, "tasks": stored.tasks,
            "subject": subjects.pick, "looked": subjects.looked, "others": training.others,
            "base": training.model, "start": training.advanced["init_adapter"],
        }  # fmt: skip
        _connect_clock(context, restored, fields)
    return blocks


def _address(context: Context, tabs: gr.Tabs, fields: dict[str, Any]) -> Address:
    """Return the parts of the page that its address names, with ``fields`` by name."""

    def existing() -> dict[str, list[str]]:
        jobs = context.jobs()
        with_adapter = [job for job in jobs if job.stands]
        # A run's id denotes its selected adapter, which may also be chosen by name.
        named = [f"{job.id}/{job.stands}" for job in with_adapter]
        return {
            "subject": ids_in(context.workspace.subjects),
            "run": [value for _, value in run.run_choices(jobs)],
            "adapter": [*(value for _, value in model_choices(context, jobs)), *named],
            "library": [job.id for job in with_adapter],
        }

    def default_tab() -> str:
        is_training = any(job.is_active and job.kind == "train" for job in context.jobs())
        return "train" if is_training else "subject"

    return Address(tabs, fields, existing, default_tab)


def _connect_run(view: run.RunView, tabs: gr.Tabs, fields: dict[str, Any]) -> None:
    """Connect the buttons that open a tab with the displayed run selected in its field."""
    for tab, button in (("generate", view.to_generate), ("library", view.to_library)):
        opened = functools.partial(lambda tab, run_id: [gr.Tabs(selected=tab), run_id], tab)
        ui.on(button.click, opened, [view.run], [tabs, fields[tab]])


def _connect_clock(context: Context, restored: Any, fields: dict[str, Any]) -> None:
    """Refresh all fields when the page loads and by one timer.

    The timer sends texts itself. For all other output fields of an event, Gradio rebuilds the
    configuration even without a change, which took most of the time of a refresh. A separate event
    therefore fills these fields, and only when one of them has changed.
    """
    texts = {name: field for name, field in fields.items() if isinstance(field, gr.HTML)}
    controls = {name: field for name, field in fields.items() if name not in texts}
    # The last updates that this page received, and a mark that changes with the controls.
    seen_texts, seen_controls, mark = gr.State({}), gr.State({}), gr.State("")

    inputs = [fields[name] for name in CHOOSERS]

    def updates(*values: Any) -> Any:
        jobs, choices = context.jobs(), dict(zip(CHOOSERS, values, strict=False))
        run_id, adapter, selected, picked = map(choices.get, CHOOSERS[:4])
        content, problems = whole_tabs(
            Subject=lambda: subject.refresh(context, jobs, picked),
            Train=lambda: (
                run.refresh(context, jobs, run_id) | train.refresh(context, jobs, choices)
            ),
            Generate=lambda: generate.refresh(context, jobs, adapter, choices),
            Library=lambda: library.refresh(jobs, selected),
        )
        problems += [context.queue.problem] if context.queue.problem else []
        return {"header": html.header(jobs, problems), **content}

    again = functools.partial(read_again_if_deleted, context)

    @again
    def tick(seen: dict[str, Any], *choices: Any) -> list[Any]:
        now = updates(*choices)
        marks = [now[name][0] for name in controls if name in now]
        return [repr(marks), *_changes(seen, now, texts)]

    @again
    def fill(seen: dict[str, Any], *choices: Any) -> list[Any]:
        return _changes(seen, updates(*choices), controls)

    outputs = [mark, seen_texts, *texts.values()]
    clock = gr.Timer(TICK_SECONDS)
    ui.on(clock.tick, tick, [seen_texts, *inputs], outputs, trigger_mode="once")
    ui.on(restored.then, tick, [seen_texts, *inputs], outputs)
    filled = [seen_controls, *controls.values()]
    ui.on(mark.change, fill, [seen_controls, *inputs], filled, trigger_mode="always_last")


def whole_tabs(**tabs: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return the tabs' content, and an error line for each tab that fails and is not updated."""
    content: dict[str, Any] = {}
    problems = []
    for name, refresh in tabs.items():
        try:
            content |= refresh()
        except FileNotFoundError:
            raise  # see `read_again_if_deleted`
        except Exception as error:
            problems.append(f"{name} cannot be shown: {explain_to_all(error)}")
            _log_once(repr(error))
    return content, problems


@functools.lru_cache(maxsize=64)
def _log_once(error: str) -> None:
    """Print the traceback of the current error once, although the timer repeats the error."""
    traceback.print_exc(file=sys.stderr)


def read_again_if_deleted(context: Context, handler: Handler) -> Handler:
    """Wrap a refresh so that it is retried if a file is deleted while it runs.

    The jobs are listed again before each retry.
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


def _changes(before: dict[str, Any], now: dict[str, Any], names: Iterable[str]) -> list[Any]:
    """Return the new state of the page, then an update for each field that has changed."""
    seen, updates = dict(before or {}), []
    for name in names:
        if name not in now:
            updates.append(gr.skip())
            continue
        update = now[name]
        mark = update[0] if isinstance(update, tuple) else update
        updates.append(ui.filled(update) if seen.get(name, _NEVER) != mark else gr.skip())
        seen[name] = mark
    return [seen, *updates]


_NEVER = object()


@dataclass(frozen=True)
class Address:
    """Parts of the page that its address names.

    Attributes:
        tabs: The tabs.
        fields: Fields of selected objects, by their names in the address.
        existing: Returns the valid values of these fields by name.
        default_tab: Returns the tab to open if the address names none.
    """

    tabs: gr.Tabs
    fields: Mapping[str, Any]
    existing: Callable[[], Mapping[str, Collection[str]]]
    default_tab: Callable[[], str]

    def connect(self) -> None:
        """Write each opened tab and selected object into the address."""
        for tab in self.tabs.children:
            ui.on(tab.select, None, js=f"() => studio.locate('tab', '{tab.id}')")
        for name, field in self.fields.items():
            js = f"(id) => studio.locate('{name}', id === {json.dumps(GONE)} ? '' : id)"
            ui.on(field.change, None, [field], js=js)

    def open_tab(self, query: Mapping[str, str]) -> Any:
        """Return an update of the tabs for an address."""
        ids = [tab.id for tab in self.tabs.children]
        opened = query.get("tab") if query.get("tab") in ids else self.default_tab()
        return gr.skip() if opened == ids[0] else gr.Tabs(selected=opened)

    def selected(self, query: Mapping[str, str], drafted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the selections by name: the address's, else the draft's; None if both are gone."""
        existing = self.existing()
        values = {name: (query.get(name), drafted.get(name)) for name in self.fields}
        return {
            name: next((value for value in pair if value in existing[name]), None)
            for name, pair in values.items()
        }


def kept_fields(blocks: gr.Blocks, besides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return all input fields of the page by tab and label.

    Args:
        blocks: The page.
        besides: Fields to exclude, which are stored separately.
    """
    excluded = {id(field) for field in (besides or {}).values()}
    return {
        _name(field): field
        for field in blocks.blocks.values()
        if isinstance(field, _KINDS)
        and field.interactive is not False
        and id(field) not in excluded
    }


def _name(field: Any) -> str:
    parent = field.parent
    while parent is not None and not isinstance(parent, gr.Tab):
        parent = parent.parent
    return f"{parent.id if parent else ''}/{field.label}"


def keep_draft(blocks: gr.Blocks, besides: Mapping[str, Any], address: Address) -> Any:
    """Store a draft of the page's fields, and restore it on load. Returns the event after that.

    Args:
        blocks: The page.
        besides: Fields to exclude, which are stored separately.
        address: Tabs and selections that the page's address names; these precede the draft's.
    """
    named = kept_fields(blocks, besides)
    located = {name: _name(field) for name, field in address.fields.items()}
    fields, draft = list(named.values()), ui.storage("page", {})
    for name, field in named.items():  # The script finds fields by id.
        field.elem_id = field.elem_id or re.sub(r"\W+", "-", name).strip("-")

    def restore(stored: Any, request: gr.Request | None = None) -> list[Any]:
        values = dict(stored) if isinstance(stored, dict) else {}
        query = request.query_params if request else {}
        drafted = {name: values.get(key) for name, key in located.items()}
        selected = address.selected(query, drafted)
        values |= {key: selected[name] for name, key in located.items()}
        updates = []
        for name, field in named.items():
            value = values.get(name)
            if value and isinstance(value, str) and _lacks_choice(field, value):
                gr.Warning(f"{field.label}: {value[:_SHOWN]} is no longer a choice; choose again")
                updates.append(gr.update(value=None))
            elif value != field.value and can_hold(field, value):
                updates.append(ui.holding(field, value))
            else:
                updates.append(gr.skip())
        return [*updates, address.open_tab(query)]

    ui.on(
        ui.together("draft", fields), None, [draft, *fields], [draft],
        js=f"(kept, ...values) => studio.keep(kept, {json.dumps(list(named))}, values)",
    )  # fmt: skip
    typed_fields = {
        field.elem_id: name
        for name, field in named.items()
        if isinstance(field, gr.Dropdown) and field.allow_custom_value and not field.multiselect
    }
    typed = "(kept) => ({...kept, ...studio.typed()})"
    restored = ui.on(blocks.load, restore, [draft], [*fields, address.tabs], js=typed)
    address.connect()
    restore_typed = f"(kept) => studio.restored(kept, {json.dumps(typed_fields)})"
    return ui.on(restored.then, None, [draft], [draft], js=restore_typed)


def can_hold(field: Any, value: object) -> bool:
    """Return whether a value from a browser's draft, maybe of another version, fits a field."""
    if isinstance(field, gr.Checkbox):
        return isinstance(value, bool)
    if isinstance(field, (gr.Number, gr.Slider)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if isinstance(field, gr.Slider):  # see `ui.holding`
            return True
        least, most = field.minimum, field.maximum
        return (least is None or value >= least) and (most is None or value <= most)
    if isinstance(field, gr.CheckboxGroup) or getattr(field, "multiselect", False):
        return isinstance(value, list) and all(_is_choice(field, item) for item in value)
    return _is_choice(field, value)


def _lacks_choice(field: Any, value: str) -> bool:
    """Return whether a browser's stored value is missing from a list of fixed choices."""
    is_one = isinstance(field, (gr.Radio, gr.Dropdown)) and not getattr(field, "multiselect", False)
    return is_one and not _is_choice(field, value)


def _is_choice(field: Any, value: object) -> bool:
    """Return whether a value is a short text, and one of the choices if they are fixed."""
    if not isinstance(value, str) or len(value) > (getattr(field, "max_length", None) or ui.LIMIT):
        return False
    choices = [choice for _, choice in getattr(field, "choices", None) or ()]
    return not choices or getattr(field, "allow_custom_value", False) or value in choices
