"""Restoring the page on a reload: its fields from a draft, tab and selections from its address.

The draft belongs to the user, not to the server: the browser stores it for all of its windows. It
includes all fields of the page. Captions and the words of a subject are stored separately
(captions.js), because they change with the photo or subject. The address belongs to one window, and
names the open tab and the selected objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from dora_diffusion.studio.app.views import ui
from dora_diffusion.studio.jobs.store import GONE

_SHOWN = 256
_KINDS = (
    gr.Textbox, gr.Number, gr.Slider, gr.Checkbox, gr.CheckboxGroup, gr.Radio, gr.Dropdown,
)  # fmt: skip


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
