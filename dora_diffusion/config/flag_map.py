"""Flags of other trainers that are not settings here, with the setting or flag to use instead.

The command line answers with these texts; docs/howto/from-diffusers-scripts.md and from-kohya.md
describe the differences of shared settings. ``flags.json`` maps flags to answers, and ``names`` in
it maps settings to other names for them. It covers sd-scripts'
``train_network.py`` and ``sdxl_train_network.py``, and of Diffusers
``examples/dreambooth/train_dreambooth_lora.py`` and ``train_dreambooth_lora_sdxl.py``, and
``examples/advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py`` and
``train_dreambooth_lora_sdxl_advanced.py``.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

from dora_diffusion.config.file import read_facts
from dora_diffusion.config.train import settings
from dora_diffusion.config.wording import closest

_FACTS = read_facts("config/flags")


class Answer(NamedTuple):
    """Answer to a flag of another script.

    Attributes:
        status: renamed: accepted, sets another setting. ignored: accepted, has no effect.
            absent: refused.
        text: Advice on what to use instead.
        setting: Setting that a renamed flag sets.
    """

    status: Literal["renamed", "ignored", "absent"]
    text: str
    setting: str = ""


def _answers(table: str) -> dict[str, str]:
    return {flag: text for flags, text in _FACTS[table].items() for flag in flags.split()}


OTHER_NAMES = {word: name for name, words in _FACTS["names"].items() for word in words.split()}
"""Other name of a setting -> the setting."""

DIFFUSERS_FLAGS: dict[str, Answer] = {
    "token_abstraction": Answer("renamed", "--token, one word", "token"),
    **{name: Answer("ignored", text) for name, text in _answers("ignored").items()},
    **{name: Answer("absent", text) for name, text in _answers("absent").items()},
}
"""Flag without dashes -> its answer; all other flags are settings of the same name."""


@cache
def _sd_scripts() -> dict[str, str]:
    """Flags of sd-scripts and options of its dataset files that are refused, with advice."""
    options = read_facts("config/kohya").items()
    refused = {name: facts["instead"] for name, facts in options if "instead" in facts}
    del refused["validation_split"]
    return refused | _answers("sd-scripts")


def refusal(name: str) -> str | None:
    """Return the refusal of another trainer's flag, with advice; None for other names."""
    answer = DIFFUSERS_FLAGS.get(name)
    if answer is not None and answer.status == "absent":
        return f"{name} of Diffusers' scripts is not here: {answer.text}"
    text = _sd_scripts().get(name)
    return text and f"{name} of sd-scripts is not here: {text}"


def meant_by(name: str) -> str | None:
    """Return the setting that an unknown name probably means; None if nothing is close."""
    known = [setting.name for setting in settings()]
    return OTHER_NAMES.get(name.lower().replace("-", "_")) or closest(name, known)
