"""Flags of other trainers that are no settings here, and what to use.

The command line answers from them; docs/howto/from-diffusers-scripts.md and from-kohya.md have what
differs in those that are. ``flags.json`` has each answer behind its flags, and under ``names`` the
words for a setting that people type, or other trainers have. It covers sd-scripts'
``train_network.py`` and ``sdxl_train_network.py``, and of Diffusers
``examples/dreambooth/train_dreambooth_lora.py`` and ``train_dreambooth_lora_sdxl.py``, and
``examples/advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py`` and
``train_dreambooth_lora_sdxl_advanced.py``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from dora_diffusion.config.file import read_facts
from dora_diffusion.config.kohya import REFUSED
from dora_diffusion.config.train import settings
from dora_diffusion.config.wording import closest

_FACTS = read_facts("config/flags")


class Answer(NamedTuple):
    """Answer to a flag of another script.

    Attributes:
        status: renamed: accepted, and sets another setting. ignored: accepted, and needs nothing
            here. absent: refused.
        text: What to use instead.
        setting: The setting that a renamed flag sets.
    """

    status: Literal["renamed", "ignored", "absent"]
    text: str
    setting: str = ""


def _answers(table: str) -> dict[str, str]:
    return {flag: text for flags, text in _FACTS[table].items() for flag in flags.split()}


_SD_SCRIPTS = {n: text for n, text in REFUSED.items() if n != "validation_split"}
_SD_SCRIPTS |= _answers("sd-scripts")
OTHER_NAMES = {word: name for name, words in _FACTS["names"].items() for word in words.split()}
"""Name that is none here -> the setting that is meant."""

DIFFUSERS_FLAGS: dict[str, Answer] = {
    "token_abstraction": Answer("renamed", "--token, one word", "token"),
    **{name: Answer("ignored", text) for name, text in _answers("ignored").items()},
    **{name: Answer("absent", text) for name, text in _answers("absent").items()},
}
"""Flag without its dashes -> what it is here; the others are settings of the same name."""


def refusal(name: str) -> str | None:
    """Return why a flag of other trainers is refused and what to use; None for other names."""
    answer = DIFFUSERS_FLAGS.get(name)
    if answer is not None and answer.status == "absent":
        return f"{name} of Diffusers' scripts is not here: {answer.text}"
    text = _SD_SCRIPTS.get(name)
    return text and f"{name} of sd-scripts is not here: {text}"


def meant_by(name: str) -> str | None:
    """The setting that is meant by a name that is none; None where nothing is close."""
    known = [setting.name for setting in settings()]
    return OTHER_NAMES.get(name.lower().replace("-", "_")) or closest(name, known)
