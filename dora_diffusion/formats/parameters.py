"""Parameters text of an image, as A1111 writes it and other web UIs read it.

::

    a photo of a mug <lora:my-mug:0.8>
    Negative prompt: blurry
    Steps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 3

Tags in the prompt load networks: adapters by ``<lora:NAME:STRENGTH>``, or with separate strengths
``<lora:NAME:TEXT_ENCODERS:UNET>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

NEGATIVE = "Negative prompt:"
_TAG = re.compile(r" ?<lora:([^:<>]+)((?::[^:<>]+)*)>")
# A tag of any network; it may be incomplete.
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>?")
_OTHER_NETWORK = re.compile(r"<(?:hypernet|lyco):[^<>]+>")
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![^:])"
# One or two strengths, and options of other programs.
_STRENGTHS = re.compile(rf"(?:{_NUMBER}(?::{_NUMBER})?)?:?(.*)", re.DOTALL)
_SETTINGS_LINE = re.compile(rf"^\s*(Steps: \d+,|{NEGATIVE}).*", re.MULTILINE)
# The length of a name has a limit, since the search takes the cube of it in a line of spaces.
_FIELD = re.compile(r'([\w-][\w /-]{0,63}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def network_tags(prompt: str) -> list[str]:
    """Return the tags of networks in a prompt, including incomplete ones."""
    return _NETWORK.findall(prompt)


def without_other_networks(prompt: str) -> tuple[str, list[str]]:
    """Split a prompt into the text without tags of networks other than LoRA, and these tags."""
    return _OTHER_NETWORK.sub("", prompt), _OTHER_NETWORK.findall(prompt)


def tag_name(name: str) -> str:
    """Replace characters that separate names in texts."""
    return re.sub(r"[<>:,\n]", "_", name)


def lora_tag(name: str, *strengths: object) -> str:
    """Return the tag of an adapter with its strengths: one, or text encoders and UNet."""
    return f"<lora:{':'.join([name, *map(str, strengths)])}>"


def split_tags(prompt: str) -> tuple[str, list[tuple[str, str]]]:
    """Split a prompt into its text and the adapters' tags: names, and texts ``:STRENGTH``."""
    return _TAG.sub("", prompt).strip(), _TAG.findall(prompt)


def split_strengths(text: str) -> tuple[str | None, str | None, str]:
    """Split the part of a tag after its name.

    Returns:
        The strength of text encoders, the strength of the UNet (each None if missing), and the
        options of other programs, such as ``lbw=ALL``.
    """
    match = _STRENGTHS.fullmatch(text.removeprefix(":"))
    assert match is not None  # Each part is optional.
    return match[1], match[2], match[3]


def settings_line(prompt: str) -> str:
    r"""Find the first line of generation settings in a prompt that was copied from an image file.

    Example:
        >>> settings_line("a mug\nSteps: 12, Seed: 7"), settings_line("Steps: of stone")
        ('Steps: 12, Seed: 7', '')
    """
    match = _SETTINGS_LINE.search(prompt)
    return match[0].strip() if match else ""


def parameters_of(prompt: str, negative: str, fields: Mapping[str, object]) -> str:
    """Return the text of two prompts and fields."""
    lines = [prompt, *[f"{NEGATIVE} {negative}"] * bool(negative)]
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items()))
    return "\n".join(lines)


def one_paragraph(prompt: str) -> str:
    """Strip each line, as readers do, and join a line that looks like a negative prompt."""
    lines = "\n".join(line.strip() for line in prompt.strip().split("\n"))
    return re.sub(rf"\n(?={NEGATIVE})", " ", lines)


def _quoted(value: str) -> str:
    """Quote a value that contains a separator or begins with a quote, as a JSON string."""
    has_separator = re.search(r'[,:\n]|^[\s"]|\s$', value)
    return json.dumps(value, ensure_ascii=False) if has_separator else value


def fields_of(text: str) -> dict[str, str]:
    """Parse a text.

    Returns:
        ``"Prompt"`` without the adapters' tags, whose names and strengths are ``"Adapter"`` and
        ``"Adapter strength"``, separated by commas; ``"Negative prompt"``; and the fields of the
        last line by their names.
    """
    body, _, last = text.strip().rpartition("\n")
    if not re.match(r"Steps: \d", last):
        body, last = text.strip(), ""
    parts: list[list[str]] = [[], []]
    for line in map(str.strip, body.split("\n")):
        is_negative = line.startswith(NEGATIVE)
        if is_negative or parts[1]:
            parts[1].append(line.removeprefix(NEGATIVE).strip())
        else:
            parts[0].append(line)
    prompt, negative = ("\n".join(lines).strip() for lines in parts)
    prompt, tags = split_tags(prompt)
    fields = {"Prompt": prompt, "Negative prompt": negative}
    if tags:
        fields["Adapter"] = ", ".join(tag_name(name) for name, _ in tags)
        fields["Adapter strength"] = ", ".join(
            re.sub(r",\s+", ",", shares[1:]) or "1" for _, shares in tags
        )
    for name, value in _FIELD.findall(last):
        try:
            fields[name] = str(json.loads(value)) if value.startswith('"') else value.strip()
        except ValueError:  # Quoted in another way.
            fields[name] = value.strip('"')
    return fields
