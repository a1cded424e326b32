"""The model card of a merged folder: what it was made from, in place of the base's own card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# What of the base's card holds for whoever uses the merged model, too.
_LICENSE_FIELDS = ("license", "license_name", "license_link", "extra_gated_prompt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def merged_card(
    title: str, base: str, merged: Sequence[Mapping[str, Any]], triggers: Sequence[str], old: str
) -> str:
    """The README of a merged model.

    Args:
        title: Name of its folder.
        base: Name of the base: a hub id, which is linked, or the name of a folder or file.
        merged: The adapters with their strengths, as `MergeSpec.record` gives them; may be none.
        triggers: The trigger words of the adapters.
        old: The base's card, whose licence stays.
    """
    head, linked = _head(base, old)
    rows = "\n".join(
        f"| `{row['adapter']}` | {row['strength']:g} | `{str(row['sha256'])[:16]}` |{_knobs(row)}"
        for row in merged
    )
    words = " and ".join(f"**`{trigger}`**" for trigger in triggers)
    ask = f"\nWrite {words} in a prompt to get the subject.\n" if words else ""
    if not merged:
        return f"---\n{head}---\n\n# {title}\n\n{linked}, as it is.\n{ask}"
    return f"""---
{head}---

# {title}

{linked} with adapters merged into its weights by dora_diffusion. What the card of the base says of
its training holds for the base; its figures are not those of this model.
{ask}
| adapter | strength | SHA-256 |
|---|---|---|
{rows}

`dora-diffusion verify FOLDER --base BASE --adapter FILE` recomputes every merged tensor.
"""


def trained_card(title: str, base: str, trigger: str, old: str) -> str:
    """The README of a model that was trained whole; arguments as `merged_card` has them."""
    head, linked = _head(base, old)
    ask = f"\nWrite **`{trigger}`** in a prompt to get the subject.\n" if trigger else ""
    return f"""---
{head}---

# {title}

{linked}, fine-tuned by dora_diffusion. What the card of the base says of its training holds for the
base; its figures are not those of this model.
{ask}"""


def _head(base: str, old: str) -> tuple[str, str]:
    """The front matter of a card, and the base's name as the text has it."""
    fields: dict[str, Any] = {"base_model": base} if _HUB_ID.fullmatch(base) else {}
    fields |= {"library_name": "diffusers", "tags": ["text-to-image"]}
    fields |= {name: value for name, value in front_matter(old).items() if name in _LICENSE_FIELDS}
    linked = f"[{base}](https://huggingface.co/{base})" if "base_model" in fields else f"`{base}`"
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), linked


def _knobs(adapter: Mapping[str, Any]) -> str:
    """Strengths of parts that are not 1, behind a row."""
    knobs = {k: v for k, v in adapter.items() if k not in ("adapter", "sha256", "strength")}
    return "".join(f" {name.replace('_', ' ')} {value:g}" for name, value in knobs.items())


def front_matter(card: str) -> dict[str, Any]:
    """The YAML between the dashes at the top of a card; empty if there is none or it is damaged."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\s", card, re.DOTALL)
    try:
        fields = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return fields if isinstance(fields, dict) else {}


def read_card(folder: Path) -> str:
    """The card of a model folder, empty if it has none that is text."""
    try:
        return (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
