"""Files of other trainers.

A file is recognised by its contents: settings of sd-scripts (TOML), presets of kohya's GUI (JSON),
configurations of OneTrainer (JSON), ai-toolkit (YAML) and SimpleTuner (JSON, TOML, env), and
command lines of Diffusers' scripts and of sd-scripts (text). `answers` has the answers.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from dora_diffusion.config import kohya
from dora_diffusion.config.fields import ConfigError
from dora_diffusion.config.file import read_text, read_yaml
from dora_diffusion.config.flag_map import trainers

SUFFIXES = (".yaml", ".yml", ".json", ".toml", ".txt", ".sh", ".bat", ".ps1", ".env")
"""Suffixes of files of settings."""
_SCRIPT = re.compile(
    r"\b(train_(?:dreambooth(?!_dora)|text_to_image)\w*|(?:(?:sdxl|anima)_)?train_(?:network|db)"
    r"|(?:sdxl|anima)_train)"
    r"\.py\b"
)
_LINE_END = re.compile(r"\s+[\\^`]\s*\n")
_VARIABLE = re.compile(r"\s*(?:export\s+|set\s+)?([A-Za-z_]\w*)=(.*)")


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


class ForeignFileError(ConfigError):
    """A file of settings is one of another trainer.

    Attributes:
        path: The file.
        file: Its contents.
        title: Name of its kind, with an article.
    """

    def __init__(self, path: str | Path, file: ForeignFile) -> None:
        self.path, self.file = path, file
        self.title = str(trainers()[file.trainer]["title"])
        super().__init__(
            f"{path} is {self.title}; 'dora-diffusion train --config {path}' lists its settings as "
            "YAML"
        )


def require_own(path: str | Path) -> None:
    """Refuse a file of another trainer.

    Raises:
        ForeignFileError: If it is one.
    """
    if file := foreign_file(path):
        raise ForeignFileError(path, file)


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
    is_list = isinstance(data, list)
    parts = [item for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    parts += _levels(data) if isinstance(data, dict) else []
    names = {plain_name(name) for part in parts for name in part}
    for trainer, facts in reversed(trainers().items()):
        if names & {*facts.get("list_keys" if is_list else "keys", "").split()}:
            return _of_data(trainer, parts if is_list else data)
    return None


def _levels(data: dict[Any, Any]) -> list[dict[Any, Any]]:
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
    words = _words(value) if isinstance(value, str) else value if isinstance(value, list) else []
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


def plain_name(name: Any) -> str:
    """Return a setting's name as the rules have it: without dashes, variables in lower case."""
    plain = str(name).lstrip("-").replace("-", "_")
    return plain.lower() if plain.isupper() else plain
