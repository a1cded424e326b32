"""What the Train form holds between visits: kept by the browser, and checked when it comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dora_diffusion.app.settings import ADVANCED, PRESET_NAMES, SETTINGS, shown_choices

FORM = ("preset", "model", "token", "class_word", "prompts")
_LIMIT = 4000


# Keeps a form: given are what is kept, the subject's id, and the values of `FORM` and `ADVANCED`.
# It runs in the browser, so that a page that is loaded again at once has lost nothing; and not
# before the page has got back what was kept, since its fields change when they are first drawn.
SAVE_SCRIPT = f"""(kept, subject, ...values) => {{
  if (!window.ddRestored) return kept;
  const named = (names, first) =>
    Object.fromEntries(names.map((name, place) => [name, values[first + place] ?? null]));
  return {{
    subject: subject ?? '',
    form: named({json.dumps(FORM)}, 0),
    advanced: named({json.dumps(ADVANCED)}, {len(FORM)}),
  }};
}}"""
RESTORED_SCRIPT = "() => { window.ddRestored = true; }"
# Until the fields that change together have all changed.
SETTLE_SCRIPT = "() => new Promise((done) => setTimeout(done, 50))"


def subject_of_draft(draft: object) -> str:
    """Id of the subject that a draft is about; empty where there is none."""
    return _text(draft.get("subject")) if isinstance(draft, Mapping) else ""


def form_values(draft: object) -> dict[str, str]:
    """The values of `FORM` that a draft holds; those that cannot be are left out."""
    kept = _part(draft, "form")
    values = {name: _text(kept[name]) for name in FORM if isinstance(kept.get(name), str)}
    if values.get("preset") not in PRESET_NAMES:
        values.pop("preset", None)
    return values


def advanced_values(draft: object) -> dict[str, Any]:
    """The values of `ADVANCED` that a draft holds; those that cannot be are left out."""
    values = _part(draft, "advanced")
    return {name: values[name] for name in ADVANCED if _can_be(name, values.get(name))}


def _can_be(name: str, value: object) -> bool:
    setting = SETTINGS[name]
    if setting.kind is bool:
        return isinstance(value, bool)
    choices = [choice for _, choice in shown_choices(setting)]
    return isinstance(value, str) and len(value) <= _LIMIT and (not choices or value in choices)


def _part(draft: object, name: str) -> Mapping[str, Any]:
    part = draft.get(name) if isinstance(draft, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _text(value: object) -> str:
    return value[:_LIMIT] if isinstance(value, str) else ""
