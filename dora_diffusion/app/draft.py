"""What the Train form holds between visits: kept by the browser, and checked when it comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dora_diffusion.app.settings import ADVANCED, FIELDS, PRESET_NAMES
from dora_diffusion.config import setting_type

FORM = ("preset", "model", "token", "class_word", "prompts")
_LIMIT = 4000


def make_draft(subject: str | None, form: Sequence[Any], advanced: Sequence[Any]) -> dict[str, Any]:
    """A form as the browser keeps it.

    Args:
        subject: Id of the subject that it is about.
        form: Values of `FORM`.
        advanced: Values of `ADVANCED`.
    """
    return {
        "subject": subject or "",
        "form": dict(zip(FORM, form, strict=True)),
        "advanced": dict(zip(ADVANCED, advanced, strict=True)),
    }


def subject_of_draft(draft: object) -> str:
    """Id of the subject that a draft is about; empty where there is none."""
    return _text(draft.get("subject")) if isinstance(draft, Mapping) else ""


def form_values(draft: object) -> dict[str, str]:
    """The values of `FORM` that a draft holds; those that cannot be are left out."""
    values = _part(draft, "form")
    found = {name: _text(values[name]) for name in FORM if isinstance(values.get(name), str)}
    if found.get("preset") not in PRESET_NAMES:
        found.pop("preset", None)
    return found


def advanced_values(draft: object) -> dict[str, Any]:
    """The values of `ADVANCED` that a draft holds; those that cannot be are left out."""
    values = _part(draft, "advanced")
    return {name: values[name] for name in ADVANCED if _can_be(name, values.get(name))}


def _can_be(name: str, value: object) -> bool:
    kind, _ = setting_type(FIELDS[name])
    choices = FIELDS[name].metadata.get("choices")
    if kind is bool:
        return isinstance(value, bool)
    return isinstance(value, str) and len(value) <= _LIMIT and (not choices or value in choices)


def _part(draft: object, name: str) -> Mapping[str, Any]:
    part = draft.get(name) if isinstance(draft, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _text(value: object) -> str:
    return value[:_LIMIT] if isinstance(value, str) else ""
