"""Draft of the page's fields, kept in the browser: it is a person's, not the server's.

Found from the page itself: whatever field is added to it is kept. Captions have a way of their own
(captions.js), and the words of a subject too, since they are another photo's or subject's next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import gradio as gr

from dora_diffusion.studio.app.views.fields import QUIET

LIMIT = 4000
# For the browser's storage; it is not a secret, but without one each start would have another.
_SECRET = "kept in this browser"
_KINDS = (
    gr.Textbox, gr.Number, gr.Slider, gr.Checkbox, gr.CheckboxGroup, gr.Radio, gr.Dropdown,
)  # fmt: skip

# A dropdown has a value of one's own when it is left: until then this keeps it, for this tab.
_TYPED = """() => JSON.parse(sessionStorage.getItem('dora-studio-typed') ?? '{}')"""
_RESTORED = """(kept) => {{
  const own = {own}, typed = {typed};
  for (const [event, keep] of [['input', true], ['focusout', false]])
    document.addEventListener(event, ({{target}}) => {{
      const id = Object.keys(own).find((id) => document.getElementById(id)?.contains(target));
      if (!id) return;
      const now = {{...typed(), [own[id]]: keep ? target.value : undefined}};
      sessionStorage.setItem('dora-studio-typed', JSON.stringify(now));
    }});
  window.ddRestored = true;
  return {{...kept, ...typed()}};
}}"""


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


def connect(blocks: gr.Blocks, besides: Mapping[str, Any]) -> Any:
    """Keep the page's fields, and fill them again when it is loaded; returns that event.

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
        return [
            holding(field, value) if value != field.value and can_hold(field, value) else gr.skip()
            for field, value in ((field, values.get(name)) for name, field in named.items())
        ]

    # Not before the page has got back what was kept: its fields change when they are first drawn.
    save = f"""(kept, ...values) => window.ddRestored
      ? Object.fromEntries({json.dumps(list(named))}.map((name, i) => [name, values[i] ?? null]))
      : kept"""
    gr.on(
        [field.change for field in fields], None, [draft, *fields], [draft], js=save,
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    own = {
        field.elem_id: name
        for name, field in named.items()
        if isinstance(field, gr.Dropdown) and field.allow_custom_value and not field.multiselect
    }
    restored = blocks.load(
        restore, [draft], fields, js=f"(kept) => ({{...kept, ...({_TYPED})()}})", **QUIET
    )
    script = _RESTORED.format(own=json.dumps(own), typed=_TYPED)
    return restored.then(None, [draft], [draft], js=script, **QUIET)


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
