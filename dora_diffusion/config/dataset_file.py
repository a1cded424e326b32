"""Dataset files: the subjects of a run, each the settings that are its own.

Three things are read as one list of entries: a YAML file of them, and of `kohya` a folder of
folders and sd-scripts' dataset file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.config import kohya
from dora_diffusion.config.fields import ConfigError, Setting, require
from dora_diffusion.config.file import read_yaml
from dora_diffusion.config.problems import Problems, prefixed
from dora_diffusion.config.subject import ENTRY_SETTINGS, Entry
from dora_diffusion.config.wording import did_you_mean, quoted


@contextlib.contextmanager
def naming_entry(place: int) -> Iterator[None]:
    """Name the entry, counted from 1, in errors of the block."""
    with prefixed(f"dataset_config, entry {place + 1}: ", "dataset_config"):
        yield


def checked_entries(
    given: str | Path | Sequence[Any], known: Mapping[str, Setting], batch_size: int
) -> list[Entry]:
    """The entries of a dataset file, or those that are given, with their values in their types.

    An entry with several folders becomes one for each.

    Args:
        given: A YAML, TOML or JSON file, a folder of folders, or entries.
        known: All settings by name.
        batch_size: The run's, which sd-scripts' file may not contradict.

    Raises:
        ConfigError: If there is no entry, a key is not a setting of a subject, or a value has the
            wrong type.
    """
    entries, problems = list[Entry](), Problems()
    for place, entry in enumerate(listed_entries(given, batch_size)):
        with problems.collect(), naming_entry(place):
            require_mapping(entry)
            entries += [_cast(values, known) for values in by_folder(entry)]
    problems.raise_all()
    return entries


def _cast(values: Entry, known: Mapping[str, Setting]) -> Entry:
    """An entry's values in their types."""
    entry, problems = Entry(), Problems()
    for name, value in values.items():
        with problems.collect():
            _require_setting(name, known)
            entry[name] = known[name].cast(value)
    problems.raise_all()
    return entry


def listed_entries(given: str | Path | Sequence[Any], batch_size: int) -> Sequence[Entry]:
    """The entries of a dataset file as they are written there, or those that are given.

    Raises:
        ConfigError: If it cannot be read, or is not a list.
    """
    listed: Any = given
    if isinstance(given, str | Path):
        listed = _read(Path(given).expanduser(), batch_size)
    require(
        isinstance(listed, list | tuple),
        f"{given if isinstance(given, str | Path) else 'dataset_config'} must hold a list of "
        "subjects, each beginning with '- ' and a setting",
        "dataset_config",
    )
    entries: Sequence[Entry] = listed
    return entries


def require_mapping(entry: object) -> None:
    """Refuse an entry that is no settings."""
    require(
        isinstance(entry, dict),
        f"{quoted(str(entry))} is not a subject; one begins with '- ' and a setting such as "
        "'instance_data_dir: photos/rex'",
    )


def by_folder(entry: Entry) -> list[Entry]:
    """An entry with several folders as one for each."""
    folders = entry.get("instance_data_dir")
    each = folders if isinstance(folders, list) else [folders]
    return [entry if folder is None else entry | {"instance_data_dir": folder} for folder in each]


def _require_setting(name: str, known: Container[str]) -> None:
    """Refuse a key of an entry that is no setting of a subject."""
    if name in ENTRY_SETTINGS:
        return
    problem = f"there is no setting {name}{did_you_mean(name, ENTRY_SETTINGS)}"
    if name in known:
        problem = f"{name} is a setting of the whole run; give it beside dataset_config"
    raise ConfigError(problem, name)


def _read(path: Path, batch_size: int) -> Any:
    if path.is_dir() or path.suffix.lower() not in (".toml", ".json"):
        try:
            return kohya.folder_entries(path) if path.is_dir() else read_yaml(path)
        except ConfigError as error:  # with the path
            raise ConfigError(str(error), "dataset_config") from error
    with prefixed(f"{path}: ", "dataset_config"):
        data = kohya.read_file(path)
        return kohya.dataset_entries(data, batch_size) if isinstance(data, dict) else data
