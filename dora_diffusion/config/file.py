"""YAML files of settings, with line numbers for messages; and the package's tables of facts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from dora_diffusion.config.fields import ConfigError, require
from dora_diffusion.config.problems import Problems

_MOST_BYTES, _MOST_VALUES = 2**24, 100_000
SEGMENTS = "segments"
"""Key of a resumed run's record of changes and their steps; not a setting."""
PATHS = "paths"
RELATIVE = "relative to this file"
"""Key and value of a line in a run's file that makes its paths relative; not a setting."""


def read_facts(name: str) -> dict[str, Any]:
    """Read a table of facts of the package, such as ``config/kohya``.

    The format is JSON, which loads faster than YAML: every ``--help`` reads the tables.
    """
    file = Path(__file__).parents[1] / f"{name}.json"
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return facts


def read_values_of(path: str | PathLike[str]) -> tuple[dict[str, Any], Mapping[str, int]]:
    """Read the top-level values of a YAML file, and the line of each, counting from 1.

    Relative paths in it start at the working directory, in the ``config.yaml`` of a run at its
    folder.

    Raises:
        ConfigError: If the file is missing, is not YAML, sets a value twice, or does not hold a
            mapping; the message names the file and the line.
    """
    path = Path(path)
    is_toml = str(path).lower().endswith(".toml")
    require(not is_toml, f"{path}: this is TOML; a dataset file is given as --dataset_config")
    values, keys = _parse(path)
    values = {} if values is None else values
    require(isinstance(values, dict), f"{path} must hold 'setting: value' lines")
    is_dataset = isinstance(values.get("datasets"), list)
    require(not is_dataset, f"{path} is a dataset file of sd-scripts; give it as --dataset_config")
    settings = {str(key): value for key, value in values.items() if key != SEGMENTS}
    lines = _lines(path, keys)
    return resolve_paths(settings, Path(path).expanduser().parent), lines


def line_prefix(path: str | None, lines: Mapping[str, int]) -> Callable[[str], str]:
    """Return a function that gives the text before a message about a key of a file."""
    return lambda key: f"{path}, line {lines[key]}: " if key in lines else ""


def resolve_paths(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Resolve the relative paths in a file's settings against its folder.

    Paths that begin with ``./`` or ``../`` are relative to the file if it has the line `PATHS`.

    Raises:
        ConfigError: If that line has another value.
    """
    values = dict(values)
    meaning = values.pop(PATHS, None)
    require(
        meaning in (None, RELATIVE),
        f"{PATHS} is {meaning!r}; write '{PATHS}: {RELATIVE}', or leave the line out",
    )

    def resolved(name: str, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(("./", "../")):
            return os.path.normpath(Path(folder, value))
        if isinstance(value, dict):
            return {n: resolved(n, v) for n, v in value.items()}
        is_listed = isinstance(value, list) and (
            name == "feature" or all(isinstance(item, dict) for item in value)
        )
        return [resolved(name, item) for item in value] if is_listed else value

    return {n: resolved(n, v) for n, v in values.items()} if meaning else values


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file.

    Raises:
        ConfigError: If the file is missing or not YAML; the message names the file and the line.
    """
    return _parse(path)[0]


def _parse(path: str | Path, kind: Any = None) -> tuple[Any, list[tuple[str, int]]]:
    """Parse a YAML file: its value, and the keys of the top-level mapping with their lines."""
    import yaml

    text = read_text(path, "the config file")
    # Many times as fast, if PyYAML was built with libyaml.
    kind = kind or getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        loader = kind(text)
        root = loader.get_single_node()
        require(
            _size(root, {}) <= _MOST_VALUES,
            f"{path} has more than {_MOST_VALUES} values, counting the values that aliases repeat; "
            "write fewer",
        )
        pairs = root.value if isinstance(root, yaml.MappingNode) else ()
        keys = [(key.value, key.start_mark.line + 1) for key, _ in pairs]
        return (None if root is None else loader.construct_document(root)), keys
    except (yaml.YAMLError, RecursionError) as error:
        if kind is not yaml.SafeLoader:  # Its messages do not depend on libyaml.
            return _parse(path, yaml.SafeLoader)
        mark = getattr(error, "problem_mark", None)
        position = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(
            f"{position}: this is not valid YAML ({problem}); write 'setting: value', and quote a "
            "value that contains ': ' or begins with a sign"
        ) from error


def _size(node: Any, known: dict[int, float]) -> float:
    """Number of a YAML node's values, with repetitions by aliases; inf if it contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        items = node.value if isinstance(getattr(node, "value", None), list) else []
        children = (p for item in items for p in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]


def read_text(path: str | Path, what: str, setting: str = "") -> str:
    """Read a text file of the user, and normalize its line ends to a newline.

    Args:
        path: The file.
        what: Name of the file in messages.
        setting: Setting that names the file.

    Raises:
        ConfigError: If the file cannot be read, is larger than 16 MiB, or is not UTF-8 text.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}", setting) from error
    require(
        len(data) <= _MOST_BYTES,
        f"{what} {path} is larger than {_MOST_BYTES >> 20} MiB; give a text file",
        setting,
    )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    require("\0" not in text, f"{what} {path} is not UTF-8 text; save it as UTF-8", setting)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(path: str | Path, keys: list[tuple[str, int]]) -> dict[str, int]:
    """Line of each key of the top-level mapping."""
    lines, problems = dict[str, int](), Problems()
    for key, line in keys:
        with problems.collect(f"{path}, line {line}: "):
            require(
                key not in lines,
                f"{key} is already set in line {lines.get(key)}; keep one of them",
                key,
            )
        lines.setdefault(key, line)
    problems.raise_all()
    return lines
