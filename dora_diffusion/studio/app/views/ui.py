"""Parts of all tabs: handlers, fields, and the draft of them that the browser keeps.

The draft is a person's, not the server's. It is found from the page itself: whatever field is
added is kept. Captions have a way of their own (captions.js), and the words of a subject too, since
they are another photo's or subject's next.
"""

from __future__ import annotations

import functools
import json
import re
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gradio as gr

from dora_diffusion.config import Setting
from dora_diffusion.studio.app.context import plain
from dora_diffusion.studio.app.settings import setting_text, shown_choices, with_labels
from dora_diffusion.studio.jobs.store import GONE

_BLANK = 256
_TOGETHER = 16


def on(
    event: Any,
    handler: Callable[..., Any] | None,
    inputs: Any = None,
    outputs: Any = None,
    *,
    confirm: Callable[..., str] | None = None,
    show: str = "hidden",
    **options: Any,
) -> Any:
    """Connect an event, or several, to a handler. It is not in the API's list.

    Args:
        event: A listener of a field, such as ``button.click``, or a list of them.
        handler: What it raises is shown as one plain line, see `plain`.
        inputs: Fields whose values it is given.
        outputs: Fields that it fills.
        confirm: Returns the question for these inputs, which names what is deleted. The handler
            only runs once it is confirmed, and where its first input is not empty.
        show: Sign of work, as Gradio's ``show_progress``.
        options: Of Gradio's.
    """
    asked: Any = handler
    if confirm and handler:
        return _confirmed(event, confirm, handler, inputs, outputs, show=show, **options)
    events = event if isinstance(event, list) else [event]
    shown: dict[str, Any] = {"api_visibility": "private", "show_progress": show}
    if show == "hidden":
        # The page would look in all of itself for each output, at each step of each event.
        shown["show_progress_on"] = []
    if any(getattr(one, "event_name", "") == "change" for one in events):
        options.setdefault("trigger_mode", "always_last")
    register = functools.partial(gr.on, event) if isinstance(event, list) else event
    if asked and options.get("trigger_mode") == "always_last":
        # What came in between is done by repeating the whole event, for all its handlers: two that
        # waited for the last would have each other repeated for ever. `then` repeats one alone.
        register = register(None, js="() => {}", **shown).then
    return register(asked and plain(asked), inputs, outputs, **shown, **options)


def _confirmed(
    event: Any, confirm: Callable[..., str], handler: Callable[..., Any], inputs: Sequence[Any],
    outputs: Sequence[Any], **options: Any,
) -> Any:  # fmt: skip
    """Connect an event to a handler that runs once the question before it is confirmed.

    The question is of the object that was chosen when the event came, and of no other.
    """

    def ask(chosen: Any, *more: Any) -> dict[str, Any]:
        return {"id": chosen, "question": confirm(chosen, *more) if chosen else ""}

    @functools.wraps(handler)
    def confirmed(chosen: Any, *more: Any) -> Any:
        values = more[: len(inputs) - 1]  # The last one is the question.
        return handler(chosen, *values) if chosen else [gr.skip()] * len(outputs)

    del confirmed.__wrapped__  # Gradio counts the inputs by its signature.
    question = gr.JSON(visible=False)
    asked = on(event, ask, inputs, [question])
    options["js"] = "studio.confirmed"
    return on(asked.success, confirmed, [*inputs, question], outputs, **options)


def html_block(value: str = "", **options: Any) -> Any:
    """HTML without the space that Gradio puts around it."""
    return gr.HTML(value, padding=False, **options)


def button(text: str, name: str | None = None, **options: Any) -> Any:
    """A button of middle size; it is found on the page by its name."""
    return gr.Button(text, elem_id=name, **{"size": "md", **options})


def line(label: str, name: str, value: str = "", **options: Any) -> Any:
    """A field for one line of text; it is found on the page by its name."""
    return gr.Textbox(value, label=label, max_lines=1, elem_id=name, **options)


def gallery(**options: Any) -> Any:
    """Images as they are: Gradio stretches a few of them to fill the width unless told not to."""
    options = {"show_label": False, "height": "auto", "buttons": [], **options}
    return gr.Gallery(fit_columns=False, object_fit="contain", **options)


def image_or_blank(
    label: str, read: Callable[..., Any], *args: Any, **options: Any
) -> tuple[Any, str]:
    """An image of a gallery with its label; a blank one with the reason where it is damaged."""
    from PIL import Image

    try:
        return read(*args, **options), label
    except (ValueError, OSError) as error:
        return Image.new("RGB", (_BLANK, _BLANK), "gray"), f"{label}: {error}"


def setting_field(setting: Setting, value: Any, label: str = "") -> Any:
    """The field of a setting: a label or its name on the command line, its help, its choices."""
    text = "" if setting.is_required else setting_text(value)
    info = with_labels(setting.help)
    if label:  # and its neighbours have one too
        info = re.sub(r"--(\w+)", lambda name: name[1].replace("_", " "), info)
    common: dict[str, Any] = {"label": label or setting.name, "info": info}
    if setting.kind is bool and setting.default is not None:
        return gr.Checkbox(text, **common)
    if choices := shown_choices(setting):
        return gr.Dropdown(choices, value=text, **common)
    limit = 500 if setting.is_list else 40 if setting.kind in (int, float) else 1000
    is_told = setting.is_required or (label and "Default:" in info)
    hint = "" if is_told else with_labels(f"default: {setting.default_text}")
    return gr.Textbox(text, placeholder=hint, max_lines=1, max_length=limit, **common)


def changing(**options: Any) -> Any:
    """A part of the page that updates a field when one of the options changes."""
    return options, lambda: gr.update(**options)


def choosing(
    choices: Sequence[tuple[str, str]],
    shown: Any,
    default: Any = None,
    *,
    known: Iterable[str] = (),
    **options: Any,
) -> Any:
    """A part of the page that updates a list over objects that come and go.

    A choice whose object is gone becomes `GONE`, which gives the reason and is refused wherever it
    is used, until somebody chooses another. Any other choice is left alone.

    Args:
        choices: The objects, with labels.
        shown: The choice that the page shows, or all of several.
        default: The choice where nothing was chosen yet.
        known: Further values that may be chosen.
        options: Further properties of the field.
    """
    there = {value for _, value in choices}.union(known)
    items = [
        item if not item or item in there else GONE
        for item in (shown if isinstance(shown, list) else [shown])
    ]
    if GONE in items and there:
        choices = [(GONE, GONE), *choices]
    if isinstance(shown, list):
        value: Any = [*dict.fromkeys(items)]
    else:  # "" may be one of the choices
        value = items[0] if items[0] in there else items[0] or default
    value = None if value == GONE and not there else value
    return changing(
        choices=list(choices), **({} if value == shown else {"value": value}), **options
    )


def filled(part: Any) -> Any:
    """Return the value of a field: a part of the page is a value, or (its mark, how to make it)."""
    return part[1]() if isinstance(part, tuple) else part


# An update rebuilds a field from its class: what was set on the field itself is lost with it.
# Not by a class statement, for which Gradio's metaclass writes a .pyi file beside this one.
def _of_ids(kind: Any, taken: type) -> Any:
    def preprocess(self: Any, payload: Any) -> Any:
        return payload if isinstance(payload, taken) else None

    methods = {"preprocess": preprocess, "__module__": kind.__module__}
    return ABCMeta.__new__(type(kind), kind.__name__, (kind,), methods)


_IdDropdown, _IdCheckboxGroup = _of_ids(gr.Dropdown, str), _of_ids(gr.CheckboxGroup, list)


def id_dropdown(**options: Any) -> Any:
    """A dropdown over ids that come and go.

    Gradio compares a choice with the list of this visit, which lacks what was just deleted, and is
    empty after a restart of the app; ids are looked up where they are used.
    """
    return _IdDropdown([], **options)


def id_checkbox_group(**options: Any) -> Any:
    """Boxes over ids that come and go, as `id_dropdown`."""
    return _IdCheckboxGroup([], **options)


CLICKS = "studio.clicks(element, trigger)"


def clicked(event: gr.EventData) -> tuple[str, str]:
    """Return what a button inside of HTML was pressed for; anybody can send anything."""
    return str(getattr(event, "what", "")), str(getattr(event, "value", ""))


LIMIT = 4000
# For the browser's storage; it is not a secret, but without one each start would have another.
_SECRET = "kept in this browser"
_KINDS = (
    gr.Textbox, gr.Number, gr.Slider, gr.Checkbox, gr.CheckboxGroup, gr.Radio, gr.Dropdown,
)  # fmt: skip


def kept_fields(blocks: gr.Blocks, besides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every field that a person fills, by its tab and label.

    Args:
        blocks: The page.
        besides: Fields that are kept in another way.
    """
    others = {id(field) for field in (besides or {}).values()}
    return {
        _name(field): field
        for field in blocks.blocks.values()
        if isinstance(field, _KINDS) and field.interactive is not False and id(field) not in others
    }


def _name(field: Any) -> str:
    parent = field.parent
    while parent is not None and not isinstance(parent, gr.Tab):
        parent = parent.parent
    return f"{parent.id if parent else ''}/{field.label}"


def storage(name: str, value: Any) -> Any:
    """A value that the browser keeps."""
    return gr.BrowserState(value, storage_key=f"dora-studio-{name}", secret=_SECRET)


def keep_draft(blocks: gr.Blocks, besides: Mapping[str, Any]) -> Any:
    """Keep a draft of the page's fields, and fill it in when it is loaded; returns that event.

    Args:
        blocks: The page.
        besides: Fields that are kept in another way.
    """
    named = kept_fields(blocks, besides)
    fields, draft = list(named.values()), storage("page", {})
    for name, field in named.items():  # found by it on the page, too
        field.elem_id = field.elem_id or re.sub(r"\W+", "-", name).strip("-")

    def restore(kept: Any) -> list[Any]:
        values = kept if isinstance(kept, dict) else {}
        updates = []
        for name, field in named.items():
            value = values.get(name)
            if value and isinstance(value, str) and _lacks_choice(field, value):
                gr.Warning(f"{field.label}: {value[:_BLANK]} is no longer a choice; choose again")
                updates.append(gr.update(value=None))
            elif value != field.value and can_hold(field, value):
                updates.append(holding(field, value))
            else:
                updates.append(gr.skip())
        return updates

    on(
        together("draft", fields), None, [draft, *fields], [draft],
        js=f"(kept, ...values) => studio.keep(kept, {json.dumps(list(named))}, values)",
    )  # fmt: skip
    own = {
        field.elem_id: name
        for name, field in named.items()
        if isinstance(field, gr.Dropdown) and field.allow_custom_value and not field.multiselect
    }
    typed = "(kept) => ({...kept, ...studio.typed()})"
    restored = on(blocks.load, restore, [draft], fields, js=typed)
    restore_typed = f"(kept) => studio.restored(kept, {json.dumps(own)})"
    return on(restored.then, None, [draft], [draft], js=restore_typed)


def together(name: str, fields: Sequence[Any]) -> Any:
    """Return the event that any of these fields has changed: one for all that change together.

    At each event Gradio reads all fields that can set it off: so they are asked few at a time.

    Args:
        name: Id of an element that is added to the page for it.
        fields: The fields.
    """
    element = html_block(elem_id=name, js_on_load=f"studio.tell['{name}'] = () => trigger('input')")
    for first in range(0, len(fields), _TOGETHER):
        some = fields[first : first + _TOGETHER]
        on([field.change for field in some], None, js=f"() => studio.changed('{name}')")
    return element.input


def can_hold(field: Any, value: object) -> bool:
    """Return whether a field can have a value that a browser kept, maybe of another version."""
    if isinstance(field, gr.Checkbox):
        return isinstance(value, bool)
    if isinstance(field, (gr.Number, gr.Slider)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if isinstance(field, gr.Slider):  # see `holding`
            return True
        least, most = field.minimum, field.maximum
        return (least is None or value >= least) and (most is None or value <= most)
    if isinstance(field, gr.CheckboxGroup) or getattr(field, "multiselect", False):
        return isinstance(value, list) and all(_is_choice(field, item) for item in value)
    return _is_choice(field, value)


def _lacks_choice(field: Any, value: str) -> bool:
    """Return whether a list that never changes lacks a value, kept by a browser, of one choice."""
    is_one = isinstance(field, (gr.Radio, gr.Dropdown)) and not getattr(field, "multiselect", False)
    return is_one and not _is_choice(field, value)


def holding(field: Any, value: Any) -> Any:
    """An update that gives a field a value; a slider is widened to it.

    How far one drags is not a limit: an image may have been made by the command line.
    """
    if not isinstance(field, gr.Slider):
        return gr.update(value=value)
    low, high = min(field.minimum, value), max(field.maximum, value)
    return gr.update(value=value, minimum=low, maximum=high)


def _is_choice(field: Any, value: object) -> bool:
    """Return whether a text is short, and one of the choices; ids come and go (`id_dropdown`)."""
    if not isinstance(value, str) or len(value) > (getattr(field, "max_length", None) or LIMIT):
        return False
    choices = [choice for _, choice in getattr(field, "choices", None) or ()]
    return not choices or getattr(field, "allow_custom_value", False) or value in choices
