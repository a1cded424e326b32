"""Answers to the settings in a file of another trainer, by the rules of `flag_map`."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

from dora_diffusion.config.fields import ConfigError
from dora_diffusion.config.flag_map import OTHER_NAMES, REMOVED, notes, rules, trainers
from dora_diffusion.config.foreign import ForeignFile, plain_name
from dora_diffusion.config.train import TrainConfig, settings, settings_by_name

_OFF = ("", "none", "off", "false", "no", "0", "0.0", "never", "disabled")
_UNSET, _UNKNOWN = "off or empty there", "no setting is known for it"


class ForeignAnswers:
    """Answers to the settings of a file of another trainer.

    Attributes:
        values: Settings here with the values that carry over.
        text: The same as YAML; the file's other settings are comments.
    """

    def __init__(self, file: ForeignFile) -> None:
        self.values: dict[str, Any] = {}
        self._file = file
        self._facts = trainers()[file.trainer]
        self._rules = rules(file.trainer)
        self._given = {plain_name(name): value for name, value in file.values}
        self._sources: dict[str, str] = {}
        self._reasons: dict[str, list[str]] = {}
        for name, value in file.values:
            self._answer(name, value)
        for setting, value in self._all("defaults").items():
            if setting not in self._sources and not file.is_dataset:
                self.values[setting], self._sources[setting] = value, ""
        self.text = "\n".join(self._lines())

    def _all(self, fact: str) -> dict[str, Any]:
        """A fact of the trainer, with those of the trainer that it is based on."""
        base = trainers().get(self._facts.get("base", ""), {})
        return {**base.get(fact, {}), **self._facts.get(fact, {})}

    def _answer(self, name: str, value: Any) -> None:
        key, known = plain_name(name), settings_by_name()
        reason, setting, told = self._replaced(key), "", f"{key}={value}"
        if not reason:
            setting, value, reason = _converted(self._rule(key), value)
        if reason:
            self._add(reason, name)
        elif isinstance(self.values.get(setting), list) and self._sources[setting] == name:
            self.values[setting] = [*self.values[setting], *value]
        elif self.values.get(setting, value) != value:
            self._add(f"{setting} has another value above; see dataset_config for several", name)
        else:
            also = self._all("with")
            for other, implied in {**also.get(key, {}), **also.get(told, {})}.items():
                self.values.setdefault(other, implied)
                self._sources.setdefault(other, name)
            self._sources.setdefault(setting, name)
            if value == known[setting].default:
                shown = name if name == setting else f"{name} ({setting})"
                self._add("as by default here", shown)
            else:
                self.values.setdefault(setting, value)

    def _add(self, reason: str, name: str) -> None:
        names = self._reasons.setdefault(reason, [])
        names += [name] * (name not in names)

    def _replaced(self, key: str) -> str:
        """Reason why a setting has no effect beside others of the file; empty if it has one."""
        others = self._all("instead").get(key, "").split()
        for other in others:
            if not _is_off(self._given.get(other)) and not self._replaced(other):
                return f"{other} has the effect"
        other, _, value = self._all("needs").get(key, "").partition("=")
        given = self._given.get(other)
        has_effect = fnmatchcase(str(given), value) if value else not _is_off(given)
        return "" if not other or has_effect else f"without effect there, since {other} is {given}"

    def _rule(self, key: str) -> Any:
        if key in self._rules:
            return self._rules[key]
        for pattern, rule in self._rules.items():
            if "*" in pattern and fnmatchcase(key, pattern):
                return rule
        if key in settings_by_name():
            return key
        return OTHER_NAMES.get(key) or REMOVED.get(key, _UNKNOWN)

    def _lines(self) -> Iterator[str]:
        import yaml

        for setting, value in self.values.items():
            is_flow = isinstance(value, (list, dict))
            text = yaml.safe_dump(
                value, allow_unicode=True, width=math.inf, default_flow_style=is_flow
            )
            line = f"{setting}: {text.removesuffix('...' + chr(10)).strip()}"
            source = self._sources[setting]
            comment = source or f"default of {self._file.trainer}"
            yield line if source == setting else f"{line}  # {comment}"
        for reason, names in sorted(self._reasons.items(), key=lambda item: item[0] == _UNSET):
            yield from _comment(f"{', '.join(self._collapsed(names))}: {reason}")
        for note in self._notes():
            yield from _comment(note)
        yield f"# The page howto/{self._facts['page']} has the other differences."

    def _collapsed(self, names: Sequence[str]) -> list[str]:
        """Write ``vae.*`` for nested settings that all have the same answer."""
        shown = []
        for name in names:
            parts = name.split(".")
            for count in range(1, len(parts)):
                start = ".".join(parts[:count]) + "."
                inner = {other for other, _ in self._file.values if other.startswith(start)}
                if len(inner) > 1 and inner <= {*names}:
                    name = f"{start}*"
                    break
            shown.append(name)
        return list(dict.fromkeys(shown))

    def _notes(self) -> Iterator[str]:
        """Differences of what carries over, and what contradicts itself."""
        config = SimpleNamespace(**{s.name: s.default for s in settings()} | self.values)
        # Rules that change a value know its other meaning.
        changed = {name for name, source in self._sources.items()
                   if not isinstance(self._rules.get(plain_name(source), ""), str)
                   or self._rules.get(plain_name(source), "").startswith("-")}  # fmt: skip
        for note in notes(config, settings(), self.values.keys() - changed):
            if any(f"; {name} " in note for name in (self._file.trainer, self._facts.get("base"))):
                yield note
        own = {name: value for name, value in self.values.items() if name != "dataset_config"}
        try:
            TrainConfig.from_dict(own)
        except ConfigError as error:
            yield f"Change this before you train: {error}"


def _comment(text: str) -> list[str]:
    """Lines of a comment in YAML."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="#   ",
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _converted(rule: Any, value: Any) -> tuple[str, Any, str]:
    """Apply a rule to a value: the setting and its value, or the reason why there is none."""
    setting, known = rule, settings_by_name()
    if isinstance(rule, dict):
        ((setting, words),) = rule.items()
        word = str(value).lower()
        if word not in words and (_is_off(value) or "" in words):
            return "", None, _UNSET if _is_off(value) else words[""]
        value = words.get(word, value)
    elif rule.startswith("-") and rule[1:] in known:
        setting = rule[1:]
        with suppress(ValueError, TypeError):
            value = -float(value)
    if setting not in known:
        return "", None, _UNSET if _is_off(value) and rule != _UNKNOWN else rule
    if value is None or value in ("", [], {}):
        return "", None, _UNSET
    try:
        return setting, known[setting].read(_typed(setting, value)), ""
    except ConfigError as error:
        reason = str(error).partition(" (did you mean")[0]
        return "", None, _UNSET if _is_off(value) else reason


def _typed(setting: str, value: Any) -> Any:
    """Value of a setting from the text of another program, such as ``512,512`` or ``"true"``."""
    known = settings_by_name()[setting]
    if setting == "resolution":
        sides = {float(side) for side in re.findall(r"\d+(?:\.\d+)?", str(value))}
        if len(sides) == 1 and (side := sides.pop()) >= 64:
            return int(side)
        raise ConfigError("resolution is one number here, the side of a square in pixels")
    if known.kind is bool and isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    if known.is_list and known.kind is str and isinstance(value, str):
        return [line.strip() for line in value.splitlines() if line.strip()]
    return value


def _is_off(value: Any) -> bool:
    return value in (None, [], {}) or str(value).strip().lower() in _OFF
