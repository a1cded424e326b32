"""Helpers for all tabs: event handlers, fields, and values that the browser stores."""

from __future__ import annotations

import functools
import re
from abc import ABCMeta
from collections.abc import Callable, Iterable, Sequence
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
    """Connect one or several events to a handler, which is not listed in Gradio's API.

    Args:
        event: Listener of a field, such as ``button.click``, or a list of them.
        handler: The handler. The page shows its errors as one plain line, see `plain`.
        inputs: Fields whose values are the handler's arguments.
        outputs: Fields that the handler's results update.
        confirm: Returns a question for these inputs, with the name of the object to delete. The
            handler only runs after confirmation, and if its first input is not empty.
        show: Display of progress, as in Gradio's ``show_progress``.
        options: Further options of Gradio.
    """
    if confirm and handler:
        return _confirmed(event, confirm, handler, inputs, outputs, show=show, **options)
    events = event if isinstance(event, list) else [event]
    common: dict[str, Any] = {"api_visibility": "private", "show_progress": show}
    if show == "hidden":
        # Otherwise the page searches itself for each output at each step of each event.
        common["show_progress_on"] = []
    if any(getattr(one, "event_name", "") == "change" for one in events):
        options.setdefault("trigger_mode", "always_last")
    register = functools.partial(gr.on, event) if isinstance(event, list) else event
    if handler and options.get("trigger_mode") == "always_last":
        # Gradio handles skipped events by repeating the event for all its handlers, so two such
        # handlers would repeat each other forever. With `then` only one is repeated.
        register = register(None, js="() => {}", **common).then
    return register(handler and plain(handler), inputs, outputs, **common, **options)


def _confirmed(
    event: Any, confirm: Callable[..., str], handler: Callable[..., Any], inputs: Sequence[Any],
    outputs: Sequence[Any], **options: Any,
) -> Any:  # fmt: skip
    """Connect an event to a handler that runs after a question is confirmed.

    The question and the handler are about the object selected at the time of the event.
    """

    def ask(object_id: Any, *more: Any) -> dict[str, Any]:
        return {"id": object_id, "question": confirm(object_id, *more) if object_id else ""}

    @functools.wraps(handler)
    def confirmed(object_id: Any, *more: Any) -> Any:
        values = more[: len(inputs) - 1]  # The last one is the question.
        return handler(object_id, *values) if object_id else [gr.skip()] * len(outputs)

    del confirmed.__wrapped__  # Gradio counts the inputs by the signature.
    question = gr.JSON(visible=False)
    answered = on(event, ask, inputs, [question])
    options["js"] = "studio.confirmed"
    return on(answered.success, confirmed, [*inputs, question], outputs, **options)


def html_block(value: str = "", **options: Any) -> Any:
    """Create an HTML element without Gradio's padding."""
    return gr.HTML(value, padding=False, **options)


def button(text: str, name: str | None = None, **options: Any) -> Any:
    """Create a button of medium size; ``name`` is its id on the page."""
    return gr.Button(text, elem_id=name, **{"size": "md", **options})


def line(label: str, name: str, value: str = "", **options: Any) -> Any:
    """Create a field for one line of text; ``name`` is its id on the page."""
    return gr.Textbox(value, label=label, max_lines=1, elem_id=name, **options)


def gallery(**options: Any) -> Any:
    """Create a gallery that does not stretch its images to the full width."""
    options = {"show_label": False, "height": "auto", "buttons": [], **options}
    return gr.Gallery(fit_columns=False, object_fit="contain", **options)


def image_or_blank(
    label: str, read: Callable[..., Any], *args: Any, **options: Any
) -> tuple[Any, str]:
    """Return an image and its label; if reading fails, a blank image and the reason."""
    from PIL import Image

    try:
        return read(*args, **options), label
    except (ValueError, OSError) as error:
        return Image.new("RGB", (_BLANK, _BLANK), "gray"), f"{label}: {error}"


def setting_field(setting: Setting, value: Any, label: str = "") -> Any:
    """Create the field of a setting, with a label or its command-line name, help and choices."""
    text = "" if setting.is_required else setting_text(value)
    info = with_labels(setting.help)
    if label:  # Then the neighbouring fields have labels too.
        info = re.sub(r"--(\w+)", lambda name: name[1].replace("_", " "), info)
    common: dict[str, Any] = {"label": label or setting.name, "info": info}
    if setting.kind is bool and setting.default is not None:
        return gr.Checkbox(text, **common)
    if choices := shown_choices(setting):
        return gr.Dropdown(choices, value=text, **common)
    limit = 500 if setting.is_list else 40 if setting.kind in (int, float) else 1000
    has_default_in_help = setting.is_required or (label and "Default:" in info)
    hint = "" if has_default_in_help else with_labels(f"default: {setting.default_text}")
    return gr.Textbox(text, placeholder=hint, max_lines=1, max_length=limit, **common)


def changing(**options: Any) -> Any:
    """Return an update of a field, as (mark, factory); it is sent when an option changes."""
    return options, lambda: gr.update(**options)


def choosing(
    choices: Sequence[tuple[str, str]],
    selected: Any,
    default: Any = None,
    *,
    known: Iterable[str] = (),
    **options: Any,
) -> Any:
    """Return an update of a list of objects, which may be created and deleted.

    A selected object that was deleted becomes `GONE`, whose label is the reason; all handlers
    refuse it until the user makes another choice. Other selections are unchanged.

    Args:
        choices: The objects, with labels.
        selected: Current value of the field: a choice, or a list of choices.
        default: Value if nothing is selected yet.
        known: Further valid values.
        options: Further properties of the field.
    """
    valid = {value for _, value in choices}.union(known)
    items = [
        item if not item or item in valid else GONE
        for item in (selected if isinstance(selected, list) else [selected])
    ]
    if GONE in items and valid:
        choices = [(GONE, GONE), *choices]
    if isinstance(selected, list):
        value: Any = [*dict.fromkeys(items)]
    else:  # "" may be one of the choices
        value = items[0] if items[0] in valid else items[0] or default
    value = None if value == GONE and not valid else value
    return changing(
        choices=list(choices), **({} if value == selected else {"value": value}), **options
    )


def filled(update: Any) -> Any:
    """Return the value of an update, which is a value or (mark, factory)."""
    return update[1]() if isinstance(update, tuple) else update


def _read_id(self: Any, payload: Any) -> Any:
    return payload if isinstance(payload, str) else None


# A subclass, because an update rebuilds a field from its class and loses attributes of the object.
# No class statement: Gradio's metaclass would write a .pyi file next to this module.
_IdDropdown: Any = ABCMeta.__new__(
    type(gr.Dropdown), gr.Dropdown.__name__, (gr.Dropdown,),
    {"preprocess": _read_id, "__module__": gr.Dropdown.__module__},
)  # fmt: skip


def id_dropdown(**options: Any) -> Any:
    """Create a dropdown of ids, which are checked where they are used.

    Gradio would compare a choice with the list of this session, which may be outdated, and is empty
    after a restart of the app.
    """
    return _IdDropdown([], **options)


CLICKS = "studio.clicks(element, trigger)"


def clicked(event: gr.EventData) -> tuple[str, str]:
    """Return action and value of a clicked button in HTML, which are untrusted text."""
    return str(getattr(event, "what", "")), str(getattr(event, "value", ""))


LIMIT = 4000
# Key of the browser's storage. It is not secret; without it, each start would use a new one.
_SECRET = "kept in this browser"


def storage(name: str, value: Any) -> Any:
    """Create a value that the browser stores."""
    return gr.BrowserState(value, storage_key=f"dora-studio-{name}", secret=_SECRET)


def together(name: str, fields: Sequence[Any]) -> Any:
    """Return an event for changes of any of these fields, sent once for simultaneous changes.

    Gradio reads all trigger fields of an event each time, so they are connected in small groups.

    Args:
        name: Id of the element that is added to the page for the event.
        fields: The fields.
    """
    element = html_block(elem_id=name, js_on_load=f"studio.tell['{name}'] = () => trigger('input')")
    for first in range(0, len(fields), _TOGETHER):
        some = fields[first : first + _TOGETHER]
        on([field.change for field in some], None, js=f"() => studio.changed('{name}')")
    return element.input


def holding(field: Any, value: Any) -> Any:
    """Return an update that sets a field's value, and extends a slider's range if needed.

    A slider's range is not a limit: an image from the command line may have other values.
    """
    if not isinstance(field, gr.Slider):
        return gr.update(value=value)
    low, high = min(field.minimum, value), max(field.maximum, value)
    return gr.update(value=value, minimum=low, maximum=high)
