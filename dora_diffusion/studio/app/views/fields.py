"""A field for a training setting, from the metadata that its flag is made from."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import gradio as gr

from dora_diffusion.config import Setting
from dora_diffusion.studio.app.settings import setting_text, shown_choices, with_labels

# How handlers are registered: not in the API's list, with or without a sign of work.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
BUSY: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
_BLANK = 256


def html_block(value: str = "", **options: Any) -> Any:
    """HTML without the space that Gradio puts around it."""
    return gr.HTML(value, padding=False, **options)


def gallery(**options: Any) -> Any:
    """Images as they are: Gradio stretches a few of them to fill the width unless told not to."""
    options = {"show_label": False, "height": "auto", "buttons": [], **options}
    return gr.Gallery(fit_columns=False, object_fit="contain", **options)


def image_or_blank(make: Callable[[], Any], label: str) -> tuple[Any, str]:
    """An image of a gallery with its label; a blank one with the reason where it is damaged."""
    from PIL import Image

    try:
        return make(), label
    except (ValueError, OSError) as error:
        return Image.new("RGB", (_BLANK, _BLANK), "gray"), f"{label}: {error}"


def setting_field(setting: Setting, value: Any) -> Any:
    """The field of a setting: its name on the command line, its help, its choices."""
    text = setting_text(value)
    common: dict[str, Any] = {"label": setting.name, "info": with_labels(setting.help)}
    if setting.kind is bool and setting.default is not None:
        return gr.Checkbox(text, **common)
    if choices := shown_choices(setting):
        return gr.Dropdown(choices, value=text, **common)
    limit = 500 if setting.is_list else 40 if setting.kind in (int, float) else 1000
    return gr.Textbox(
        text,
        placeholder=with_labels(f"default: {setting.default_text}"),
        max_lines=1,
        max_length=limit,
        **common,
    )


def changing(**options: Any) -> Any:
    """A part of the page that updates a field when one of the options changes."""
    return options, lambda: gr.update(**options)


def choosing(choices: list[tuple[str, str]], value: Any, shown: Any, **options: Any) -> Any:
    """A part of the page that updates a dropdown.

    Its value is left alone where the page shows it already: somebody may choose another meanwhile.
    """
    return changing(choices=choices, **({} if value == shown else {"value": value}), **options)


def filled(part: Any) -> Any:
    """Return the value of a field: a part of the page is a value, or (its mark, how to make it)."""
    return part[1]() if isinstance(part, tuple) else part


def _text_only(self: Any, payload: Any) -> str | None:
    return payload if isinstance(payload, str) else None


# An update rebuilds a field from its class: what was set on the field itself is lost with it.
# Not by a class statement, for which Gradio's metaclass writes a .pyi file beside this one.
_IdDropdown: Any = ABCMeta.__new__(
    type(gr.Dropdown),
    "Dropdown",
    (gr.Dropdown,),
    {"preprocess": _text_only, "__module__": gr.Dropdown.__module__},
)


def id_dropdown(**options: Any) -> Any:
    """A dropdown over ids that come and go.

    Gradio compares a choice with the list of this visit, which lacks what was just deleted, and is
    empty after a restart of the app; ids are looked up where they are used.
    """
    return _IdDropdown([], **options)


# Buttons inside of HTML say what to do (data-do) and with what (data-value).
CLICKS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-do]');
  if (button) trigger('click', {what: button.dataset.do, value: button.dataset.value});
});
"""


def clicked(event: gr.EventData) -> tuple[str, str]:
    """Return what a button inside of HTML was pressed for; anybody can send anything."""
    return str(getattr(event, "what", "")), str(getattr(event, "value", ""))
