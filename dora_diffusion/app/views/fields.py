"""A field for a training setting, from the facts that its flag is made from."""

from __future__ import annotations

from typing import Any

import gradio as gr

from dora_diffusion.app.settings import FIELDS
from dora_diffusion.config import setting_type

# How handlers are registered: not in the API's list, with or without a sign of work.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
BUSY: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}


def setting_field(name: str, value: Any) -> Any:
    """The field of a setting: its name on the command line, its help, its choices."""
    setting = FIELDS[name]
    kind, is_list = setting_type(setting)
    common: dict[str, Any] = {"label": name, "info": str(setting.metadata["help"])}
    choices = setting.metadata.get("choices")
    if kind is bool:
        return gr.Checkbox(value, **common)
    if choices:
        return gr.Dropdown(list(choices), value=value, **common)
    if is_list:
        return gr.Textbox(" ".join(value), max_lines=1, max_length=500, **common)
    if kind in (int, float):
        return gr.Number(value, precision=0 if kind is int else None, **common)
    return gr.Textbox(value or "", max_lines=1, max_length=1000, **common)


def id_dropdown(**options: Any) -> Any:
    """A dropdown over ids that come and go.

    Gradio compares a choice with the list of this visit, which is empty again after a restart of
    the app; ids are looked up where they are used.
    """
    dropdown = gr.Dropdown([], **options)
    dropdown.preprocess = lambda payload: payload if isinstance(payload, str) else None
    return dropdown


# Buttons inside of HTML say what to do (data-do) and with what (data-value).
CLICKS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-do]');
  if (button) trigger('click', {what: button.dataset.do, value: button.dataset.value});
});
"""


def clicked(event: gr.EventData) -> tuple[str, str]:
    """What a button inside of HTML was pressed for; anybody can send anything."""
    return str(getattr(event, "what", "")), str(getattr(event, "value", ""))
