"""Settings of other trainers and of former versions, with what to use instead.

The command line answers with these texts; docs/howto/from-diffusers-scripts.md and from-kohya.md
describe the differences of shared settings. ``flags.json`` maps flags to answers, ``names`` in
it maps settings to other names for them, and ``removed`` in it maps what a former version had, in
any command, to advice. It covers sd-scripts' ``train_network.py`` and ``sdxl_train_network.py``,
and of Diffusers ``examples/dreambooth/train_dreambooth_lora.py``,
``train_dreambooth_lora_sdxl.py``, ``train_dreambooth_lora_z_image.py`` and
``train_dreambooth_lora_flux2_klein.py``, and
``examples/advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py`` and
``train_dreambooth_lora_sdxl_advanced.py``. ``trainers.json`` has the settings in the files of
kohya's GUI, OneTrainer, ai-toolkit and SimpleTuner, and those that files of sd-scripts and command
lines of Diffusers' scripts give in another form. `dora_diffusion.config.foreign` reads such files.

``elsewhere.json`` lists settings whose name another trainer uses with another meaning or unit. If
the difference depends on other settings, it also lists the values of these with which the results
differ. Runs print a note about such a setting, and the pages for users of that trainer list it.
Facts: sd-scripts' ``train_network.py``, Diffusers' DreamBooth LoRA scripts (for ``logit_mean`` the
scripts of flow models), OneTrainer's ``TrainConfig.py``, ai-toolkit's ``config_modules.py`` and
``scheduler.py``, of 2026.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

from dora_diffusion.config.fields import ConfigError, Need, Setting, shown
from dora_diffusion.config.file import read_facts
from dora_diffusion.config.wording import closest, did_you_mean

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

REMOVED = _answers("removed")
"""Setting, flag, field or command of a former version -> advice on what to do instead."""

_OFF: tuple[Any, ...] = (None, False, 0, "", "none", [], {})
# Defaults of removed settings, where they are not `_OFF`; alone they change nothing.
_REMOVED_DEFAULTS = {
    "caption_separator": ",", "gradient_batches": 4, "nearest_noise": 1,
    "precondition_damping": 0.01, "train_text_encoder_ti_frac": 1, "weight": 1,
}  # fmt: skip

DIFFUSERS_FLAGS: dict[str, Answer] = {
    "token_abstraction": Answer("renamed", "--token, one word", "token"),
    **{name: Answer("ignored", text) for name, text in _answers("ignored").items()},
    **{name: Answer("absent", text) for name, text in _answers("absent").items()},
    **{n: Answer("absent", REMOVED[n]) for n in ("use_8bit_adam", "train_text_encoder_ti_frac")},
}
"""Flag without dashes -> its answer; all other flags are settings of the same name."""


@cache
def trainers() -> dict[str, dict[str, Any]]:
    """Facts of each trainer, by its name."""
    return read_facts("config/trainers")


@cache
def rules(trainer: str) -> dict[str, Any]:
    """Rules of a trainer's settings, by their names.

    A rule is the name of a setting here, ``-`` and such a name for the opposite number, a mapping
    from such a name to the values of the trainer's (in lower case; an empty one has the text for
    other values), or a text on what to use instead. Names of nested settings are joined by dots,
    and may be patterns.
    """
    facts = trainers()[trainer]
    own = {name: rule for names, rule in facts["settings"].items() for name in names.split()}
    if trainer == "Diffusers":
        own = {name: a.setting or a.text for name, a in DIFFUSERS_FLAGS.items()} | own
    if trainer == "sd-scripts":
        own = _sd_scripts() | own
    return rules(facts["base"]) | own if "base" in facts else own


@cache
def _sd_scripts() -> dict[str, str]:
    """Answers to flags of sd-scripts and options of its dataset files."""
    options = read_facts("config/kohya").items()
    answers = {name: facts["instead"] for name, facts in options if "instead" in facts}
    del answers["validation_split"]
    renamed = {name: facts["setting"] for name, facts in options if "setting" in facts}
    return answers | renamed | _answers("sd-scripts")


def removal(name: str) -> str | None:
    """Return the refusal of a former version's setting, with advice; None for other names."""
    return f"{name} was removed: {REMOVED[name]}" if name in REMOVED else None


def had_no_effect(name: str, value: Any) -> bool:
    """True if a setting of a former version had no effect at this value."""
    return value in (*_OFF, _REMOVED_DEFAULTS.get(name))


def without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop removed settings at values without effect, which the file of each former run has."""
    return {n: v for n, v in values.items() if n not in REMOVED or not had_no_effect(n, v)}


def refusal(name: str) -> str | None:
    """Return the refusal of a former or another trainer's setting, with advice; else None."""
    if text := removal(name):
        return text
    answer = DIFFUSERS_FLAGS.get(name)
    if answer is not None and answer.status == "absent":
        return f"{name} of Diffusers' scripts is not here: {answer.text}"
    named: Iterable[tuple[str, Mapping[str, Any]]] = [("sd-scripts", _sd_scripts())]
    if name not in OTHER_NAMES:
        named = itertools.chain(named, ((trainer, rules(trainer)) for trainer in trainers()))
    for trainer, answers in named:
        if rule := answers.get(name):
            return f"{name} of {trainer} is not here: {advice(rule)}"
    return None


def advice(rule: Any) -> str:
    """Return what a rule advises, as a text with flags."""
    text = str(next(iter(rule)) if isinstance(rule, dict) else rule)
    setting = text.removeprefix("-")
    return f"use --{setting}" if setting.isidentifier() else text


def meant_by(name: str, known: Iterable[str]) -> str | None:
    """Return the setting that an unknown name probably means; None if nothing is close."""
    known = tuple(known)
    other = OTHER_NAMES.get(name.lower().replace("-", "_"))
    return other if other in known else closest(name, known)


def find_setting(name: str, known: Mapping[str, Setting]) -> Setting:
    """Look a setting up by its name.

    Raises:
        ConfigError: If there is none; has the advice of `REMOVED`, or suggests the closest name.
    """
    if name not in known:
        unknown = f"there is no setting {name}{did_you_mean(name, known)}"
        raise ConfigError(removal(name) or unknown, name)
    return known[name]


def find_training_setting(name: str, known: Mapping[str, Setting]) -> Setting:
    """Look a setting of training up by its name.

    Raises:
        ConfigError: If there is none; has the answer to a name of another trainer.
    """
    if name not in known:
        hint = f" (did you mean {meant}?)" if (meant := meant_by(name, known)) else ""
        raise ConfigError(refusal(name) or f"there is no setting {name}{hint}", name)
    return known[name]


class Difference(NamedTuple):
    """Meaning of a setting's name in another trainer.

    Attributes:
        trainer: Name of the other program.
        text: Difference between the two programs; the other program is its grammatical subject.
        needs: Conditions, any of which makes the same value differ in effect; empty: every value
            but the default does.
        least: Least value that differs in effect; None: any.
        usual: Value that other trainers use with the meaning it has here, which needs no note.
    """

    trainer: str
    text: str
    needs: tuple[Need, ...] = ()
    least: float | None = None
    usual: float | None = None


def _difference(
    trainer: str,
    text: str,
    only_with: Mapping[str, Sequence[Any]] | None = None,
    least: float | None = None,
    usual: float | None = None,
) -> Difference:
    needs = (Need(name, tuple(values)) for name, values in (only_with or {}).items())
    return Difference(trainer, text, tuple(needs), least, usual)


DIFFERENCES = {name: _difference(**facts) for name, facts in read_facts("config/elsewhere").items()}
"""Setting -> meaning of its name in another trainer."""


def notes(config: Any, known: Iterable[Setting], names: Iterable[str]) -> list[str]:
    """List settings whose value has another effect in another trainer, with the difference.

    Args:
        config: The settings with their values.
        known: Descriptions of the settings.
        names: Names of the settings that the user set.
    """
    lines = []
    changed = {s.name: v for s in known if (v := getattr(config, s.name)) and v != s.default}
    for name in sorted(changed.keys() & DIFFERENCES.keys() & set(names)):
        trainer, text, needs, least, usual = DIFFERENCES[name]
        if changed[name] == usual or (least is not None and changed[name] < least):
            continue
        # Other commands do not have the settings of training that it depends on.
        differs = (hasattr(config, need.setting) and need(config) is None for need in needs)
        if not needs or any(differs):
            lines.append(f"{name} is {shown(changed[name])}; {trainer} {text}")
    return lines
