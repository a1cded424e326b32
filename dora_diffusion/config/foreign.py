"""Files of other trainers: their settings by the names that they have here, as YAML.

A file is recognised by its contents: settings of sd-scripts (TOML), presets of kohya's GUI (JSON),
configurations of OneTrainer (JSON), ai-toolkit (YAML) and SimpleTuner (JSON, TOML, env), and
command lines of Diffusers' scripts and of sd-scripts (text). The rules are those of `flag_map`.
"""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any, NamedTuple

from dora_diffusion.config import kohya
from dora_diffusion.config.elsewhere import notes
from dora_diffusion.config.fields import ConfigError
from dora_diffusion.config.file import read_text, read_yaml
from dora_diffusion.config.flag_map import OTHER_NAMES, rules, trainers
from dora_diffusion.config.train import TrainConfig, settings, settings_by_name

SUFFIXES = (".yaml", ".yml", ".json", ".toml", ".txt", ".sh", ".bat", ".ps1", ".env")
"""Suffixes of files of settings."""
_OFF = ("", "none", "off", "false", "no", "0", "0.0", "never", "disabled")
_SCRIPT = re.compile(
    r"\b(train_(?:dreambooth(?!_dora)|text_to_image)\w*|(?:sdxl_)?train_(?:network|db)|sdxl_train)"
    r"\.py\b"
)
_LINE_END = re.compile(r"\s+[\\^`]\s*\n")
_VARIABLE = re.compile(r"\s*(?:export\s+|set\s+)?([A-Za-z_]\w*)=(.*)")
_UNSET, _UNKNOWN = "off or empty there", "no setting is known for it"


class ForeignFileError(ConfigError):
    """Error that a file is one of another trainer; the message has several lines."""


class ForeignFile(NamedTuple):
    """Settings of a file of another trainer.

    Attributes:
        trainer: Name of the program.
        values: Name and value of each setting; a nested name has dots.
        is_dataset: True for a list of subjects without settings of the run.
    """

    trainer: str
    values: Sequence[tuple[str, Any]]
    is_dataset: bool = False


def require_own(path: str | Path) -> None:
    """Refuse a file of another trainer, with its settings as YAML.

    Raises:
        ForeignFileError: If it is one.
    """
    if file := foreign_file(path):
        answers = Answers(file)
        raise ForeignFileError(
            f"{path} is {answers.title}. Copy these lines into a YAML file, and give that as "
            f"--config:\n{answers.text}"
        )


def foreign_file(path: str | Path) -> ForeignFile | None:
    """Read a file of another trainer; None for other files, and those that cannot be read."""
    path, data = Path(path).expanduser(), None
    with suppress(ConfigError):
        if path.suffix.lower() in (".toml", ".json"):
            data = kohya.read_file(path)
        elif path.suffix.lower() not in (".yaml", ".yml"):
            file = _of_text(read_text(path, "the file"))
            if file is not None:
                return file
    with suppress(ConfigError):
        data = read_yaml(path) if data is None else data
    is_list = isinstance(data, list) and all(isinstance(item, dict) for item in data)
    if not (is_list or isinstance(data, dict)):
        return None
    names = {_key(name) for part in (data if is_list else _levels(data)) for name in part}
    for trainer, facts in reversed(trainers().items()):
        if names & {*facts.get("list_keys" if is_list else "keys", "").split()}:
            return _of_data(trainer, data)
    return None


def _levels(data: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """A mapping and the mappings in it, such as the sections of a TOML file."""
    return [data, *(item for item in data.values() if isinstance(item, dict))]


def _of_data(trainer: str, data: Any) -> ForeignFile:
    """Flatten the values of a JSON, TOML or YAML file."""
    facts = trainers()[trainer]
    if trainer == "sd-scripts":  # It ignores the names of sections.
        data, *sections = _levels(data)
        data = {name: value for name, value in data.items() if not isinstance(value, dict)}
        data = {name: value for part in (data, *sections) for name, value in part.items()}
    values = []
    for name, value in _flat(data, facts.get("list", "") if isinstance(data, list) else ""):
        start = next((s for s in facts.get("strip", "").split() if name.startswith(s)), "")
        values.append((name.removeprefix(start).lstrip("-"), value))
    return ForeignFile(trainer, values, isinstance(data, list))


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    words = _words(value) if isinstance(value, str) else value
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if key != "__version":
                yield from _flat(item, f"{name}.{key}".removeprefix("."))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for item in value:
            yield from _flat(item, name)
    elif name.endswith("_args") and words and all("=" in str(word) for word in words):
        for word in words:
            key, _, text = str(word).partition("=")
            yield f"{name}.{key}", text
    else:
        yield name, value


def _of_text(text: str) -> ForeignFile | None:
    """Read the flags of a command line in a script, or the variables of an env file."""
    variables: dict[str, str] = {}
    for line in _LINE_END.sub(" ", text).splitlines():
        if line.lstrip().startswith("#"):
            continue
        line = Template(line).safe_substitute(variables)
        words = _words(line)
        script = next((i for i, word in enumerate(words) if _SCRIPT.search(word)), None)
        if script is not None and (flags := _flags(words[script + 1 :])):
            match = _SCRIPT.search(words[script])
            is_kohyas = match and not match[1].startswith(("train_dreambooth", "train_text"))
            launch = [(f"accelerate.{name}", value) for name, value in _flags(words[:script])]
            values = [*launch, *(pair for name, value in flags for pair in _flat(value, name))]
            return ForeignFile("sd-scripts" if is_kohyas else "Diffusers", values)
        if match := _VARIABLE.match(line):
            variables[match[1]] = " ".join(_words(match[2]))
    keys = trainers()["SimpleTuner"]["keys"].split()
    if not {name.lower() for name in variables} & {*keys}:
        return None
    more = [flag for name, value in variables.items() if name.endswith("EXTRA_ARGS")
            for flag in _flags(_words(value))]  # fmt: skip
    return ForeignFile("SimpleTuner", [*variables.items(), *more])


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an open quote
        return line.split()


def _flags(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Flags of a command line, each with its value, its values, or True."""
    flags: list[tuple[str, Any]] = []
    for word in words:
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            flags.append((name, value if sign else True))
        elif flags:
            name, value = flags[-1]
            several = value if isinstance(value, list) else [value]
            flags[-1] = name, word if value is True else [*several, word]
    return flags


def _key(name: Any) -> str:
    """Name of a setting as the rules have it: without dashes, variables in lower case."""
    name = str(name).lstrip("-").replace("-", "_")
    return name.lower() if name.isupper() else name


class Answers:
    """Answers to the settings of a file of another trainer.

    Attributes:
        title: Name of the file's kind, with its article.
        values: Settings here with the values that carry over.
        text: The same as YAML; the file's other settings are comments.
    """

    def __init__(self, file: ForeignFile) -> None:
        self.values: dict[str, Any] = {}
        self._file = file
        self._facts = trainers()[file.trainer]
        self.title = str(self._facts["title"])
        self._rules = rules(file.trainer)
        self._given = {_key(name): value for name, value in file.values}
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
        key, known = _key(name), settings_by_name()
        reason, setting = self._replaced(key), ""
        if not reason:
            setting, value, reason = _converted(self._rule(key), value)
        if reason:
            self._add(reason, name)
        elif known[setting].is_list and self._sources.get(setting) == name:
            self.values[setting] = [*self.values[setting], *value]
        elif self.values.get(setting, value) != value:
            self._add(f"{setting} has another value above; see dataset_config for several", name)
        else:
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
        return key if key in settings_by_name() else OTHER_NAMES.get(key, _UNKNOWN)

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
                   if not isinstance(self._rules.get(_key(source), ""), str)
                   or self._rules.get(_key(source), "").startswith("-")}  # fmt: skip
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
        sides = {float(side) for side in re.findall(r"\d[\d.]*", str(value))}
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
