"""Dataset files: the subjects of a run, each with its own settings.

Three forms are read as one list of entries: a YAML file, and the two of `kohya`, a folder of
folders and sd-scripts' dataset file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dora_diffusion.config import kohya
from dora_diffusion.config.fields import ConfigError, Setting, require
from dora_diffusion.config.file import read_yaml
from dora_diffusion.config.flag_map import find_training_setting
from dora_diffusion.config.foreign import require_own
from dora_diffusion.config.problems import (
    Problems,
    naming_entry,
    prefixed,
    read_values,
)
from dora_diffusion.config.subject import Entry
from dora_diffusion.config.wording import quoted


def checked_entries(
    source: str | Path | Sequence[Any], known: Mapping[str, Setting], batch_size: int
) -> list[Entry]:
    """Read the entries of a dataset file, or a list of entries, and cast their values.

    An entry with several folders becomes one entry per folder.

    Args:
        source: A YAML, TOML or JSON file, a folder of folders, or entries.
        known: All settings by name.
        batch_size: Batch size of the run; sd-scripts' file must not contradict it.

    Raises:
        ConfigError: If the list is empty, a key is not a setting of a subject, or a value has the
            wrong type.
    """
    entries, problems = list[Entry](), Problems()
    for index, entry in enumerate(listed_entries(source, batch_size)):
        with problems.collect(), naming_entry(index):
            require_mapping(entry)
            values = [read_values(part, partial(_find, known=known)) for part in by_folder(entry)]
            entries += values
    problems.raise_all()
    return entries


def listed_entries(source: str | Path | Sequence[Any], batch_size: int) -> Sequence[Entry]:
    """Read the entries of a dataset file without casts; a list of entries is returned as it is.

    Raises:
        ConfigError: If the file cannot be read, or does not hold a list.
        ForeignFileError: If it is a file of another trainer.
    """
    value: Any = source
    if isinstance(source, str | Path):
        value = _read(Path(source).expanduser(), batch_size)
    require(
        isinstance(value, list | tuple),
        f"{source if isinstance(source, str | Path) else 'dataset_config'} must hold a list of "
        "subjects, each beginning with '- ' and a setting",
        "dataset_config",
    )
    entries: Sequence[Entry] = value
    return entries


def require_mapping(entry: object) -> None:
    """Refuse an entry that is not a mapping."""
    require(
        isinstance(entry, dict),
        f"{quoted(str(entry))} is not a subject; one begins with '- ' and a setting such as "
        "'instance_data_dir: photos/rex'",
    )


def by_folder(entry: Entry) -> list[Entry]:
    """Split an entry with several folders into one entry per folder."""
    folders = entry.get("instance_data_dir")
    paths = folders if isinstance(folders, list) else [folders]
    return [entry if folder is None else entry | {"instance_data_dir": folder} for folder in paths]


def _find(name: str, known: Mapping[str, Setting]) -> Setting:
    """Look up a setting that an entry may have."""
    require(
        name not in known or known[name].of_subject,
        f"{name} is a setting of the whole run; give it outside of dataset_config",
        name,
    )
    return find_training_setting(
        name, {name: setting for name, setting in known.items() if setting.of_subject}
    )


def _read(path: Path, batch_size: int) -> Any:
    require_own(path)
    if path.is_dir() or path.suffix.lower() not in (".toml", ".json"):
        try:
            return kohya.folder_entries(path) if path.is_dir() else read_yaml(path)
        except ConfigError as error:  # Its message has the path already.
            raise ConfigError(str(error), "dataset_config") from error
    with prefixed(f"{path}: ", "dataset_config"):
        data = kohya.read_file(path)
        return kohya.dataset_entries(data, batch_size) if isinstance(data, dict) else data
