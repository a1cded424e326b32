"""A field for a training setting, from the facts that its flag is made from."""

from __future__ import annotations

from typing import Any

import gradio as gr

from dora_diffusion.app.settings import SETTINGS, setting_text, shown_choices

# How handlers are registered: not in the API's list, with or without a sign of work.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
BUSY: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}


def setting_field(name: str, value: Any) -> Any:
    """The field of a setting: its name on the command line, its help, its choices."""
    setting, text = SETTINGS[name], setting_text(value)
    common: dict[str, Any] = {"label": name, "info": setting.help}
    if setting.kind is bool:
        return gr.Checkbox(text, **common)
    if choices := shown_choices(setting):
        return gr.Dropdown(choices, value=text, **common)
    limit = 500 if setting.is_list else 40 if setting.kind in (int, float) else 1000
    return gr.Textbox(
        text,
        placeholder=f"default: {setting.default_text}",
        max_lines=1,
        max_length=limit,
        **common,
    )


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
