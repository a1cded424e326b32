"""Several subjects with one adapter each: settings of a training for each subject."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from dora_diffusion.config.config_file import read_config_file
from dora_diffusion.config.dataset_file import by_folder, listed_entries, require_mapping
from dora_diffusion.config.fields import ConfigError, Setting, require
from dora_diffusion.config.flag_map import find_training_setting
from dora_diffusion.config.kohya import folder_name, folders_in
from dora_diffusion.config.problems import read_values
from dora_diffusion.config.run import DeviceSettings
from dora_diffusion.config.subject import Entry, ModelSettings
from dora_diffusion.config.train import TrainConfig, settings, settings_by_name
from dora_diffusion.config.wording import counted, listing, quoted

SUBJECT_FILE = "subject.yaml"
"""Name of an optional file of settings in a folder of photos."""

SHARED = frozenset((
    *(setting.name for setting in settings(TrainConfig) if setting.name != "seed"
      and setting.group in (ModelSettings.heading, DeviceSettings.heading)),
    "dataset_config", "feature", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
))  # fmt: skip
"""Settings that all subjects share."""


def subject_configs(
    source: str | PathLike[str] | Sequence[Entry], config: TrainConfig
) -> dict[str, TrainConfig | ConfigError]:
    """Make the settings of a training for each subject, by name.

    Args:
        source: A dataset file (YAML list, sd-scripts' TOML, kohya's folders), or a folder whose
            sub-folders each hold the photos of one subject. An entry may have ``name`` (default:
            the name of its folder) and any setting that is not in `SHARED`. A folder may hold a
            `SUBJECT_FILE` with such settings.
        config: Common settings. The output folder of each subject is ``OUTPUT_DIR/NAME``.

    Returns:
        Name -> settings, or the error of an invalid entry: a setting is unknown, shared or not
        valid, the name is repeated or not valid for a folder, a folder has no class word and no
        prompt, or its file cannot be read. An entry with an invalid name is listed under the name
        of its folder.

    Raises:
        ConfigError: If the source cannot be read, or all entries are invalid.

    Example:
        >>> entries = [{"name": "rex", "instance_data_dir": "photos/rex", "rank": 4}]
        >>> subject_configs(entries, TrainConfig(output_dir="out"))["rex"].rank
        4
    """
    require(
        not config.dataset_config,
        "dataset_config trains one adapter on several subjects; leave it out if each subject has "
        "its own adapter",
        "dataset_config",
    )
    source = fspath(source) if isinstance(source, PathLike) else source
    entries = _entries(source, config)
    require(bool(entries), f"{source or 'the list'} holds no subject", "subjects")
    _warn_overridden(source, [located.entry for located in entries], config)
    results: dict[int, tuple[str, TrainConfig | ConfigError]] = {}
    names: dict[str, str] = {}
    # Folders take their names first; an entry that sets the same name for another one is invalid.
    for index in sorted(range(len(entries)), key=lambda index: _sets_name(entries[index].entry)):
        results[index] = _subject(entries[index], config, names)
    errors = [value for _, value in results.values() if isinstance(value, ConfigError)]
    if len(errors) == len(results):
        more = f" (and {counted(len(errors) - 1, 'other subject')})" if errors[1:] else ""
        raise ConfigError(f"{results[0][1]}{more}", "dataset_config")
    return dict(results[index] for index in range(len(entries)))


@dataclass(frozen=True)
class _LocatedEntry:
    """An unchecked entry with its location, or the error of reading it."""

    where: str
    entry: Any
    folder: str = ""


def _entries(source: str | Path | Sequence[Entry], config: TrainConfig) -> list[_LocatedEntry]:
    if isinstance(source, str | Path):
        folder = Path(source).expanduser()
        require(
            folder.exists(), f"{folder} does not exist; name a dataset file or a folder", "subjects"
        )
        inner = folders_in(folder) if folder.is_dir() else []
        if folder.is_dir() and not any(map(folder_name, inner)):
            require(
                bool(inner),
                f"{folder} holds no folders; a subject is a folder of photos",
                "subjects",
            )
            return [_plain_folder(folder, config) for folder in inner]
    file = str(source) if isinstance(source, str | Path) else "subjects"
    return [
        _LocatedEntry(f"{file}, entry {number}", entry)
        for number, entry in enumerate(listed_entries(source, config.train_batch_size), 1)
    ]


def _plain_folder(folder: Path, config: TrainConfig) -> _LocatedEntry:
    """Make an entry from a folder, with the settings of its `SUBJECT_FILE`."""
    file = folder / SUBJECT_FILE
    where = str(file if file.is_file() else folder)
    try:
        options = read_config_file(file) if file.is_file() else {}
        require("instance_data_dir" not in options, "instance_data_dir is the folder of this file")
        require(
            not _lacks_prompt(options, config)
            or bool(options.get("class_word") or config.class_word),
            "there is no class word; give --class_word, or 'class_word: dog' in its "
            f"{SUBJECT_FILE}",
            "class_word",
        )
    except ConfigError as error:
        return _LocatedEntry(where, error, folder.name)
    return _LocatedEntry(where, {"instance_data_dir": str(folder), **options}, folder.name)


def _lacks_prompt(options: Entry, config: TrainConfig) -> bool:
    """Return whether a subject with a token has no prompt."""
    token = str(options.get("token", config.token)).strip()
    return bool(token) and not (options.get("instance_prompt") or config.instance_prompt)


def _warn_overridden(
    source: str | Path | Sequence[Entry], entries: Sequence[Any], config: TrainConfig
) -> None:
    """Warn about common settings that every entry overrides."""
    overridden = [
        setting.name
        for setting in settings()
        if getattr(config, setting.name) != setting.default
        and all(isinstance(entry, dict) and setting.name in entry for entry in entries)
    ]
    if overridden:
        file = source if isinstance(source, str | Path) else "subjects"
        warnings.warn(
            f"{listing(overridden)} without effect: each entry of {file} has its own", stacklevel=3
        )


def _sets_name(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("name") is not None


def _subject(
    located: _LocatedEntry, config: TrainConfig, names: dict[str, str]
) -> tuple[str, TrainConfig | ConfigError]:
    """Name and settings of a subject, or its name and error; either way the name is used up."""
    name = ""
    try:
        if isinstance(located.entry, ConfigError):
            raise located.entry
        require_mapping(located.entry)
        own_name, options = _split_name(located.entry)
        other = names.get(own_name.casefold())
        require(
            other is None,
            f"the name {own_name!r} is also the name of {other}; give it another 'name:'",
        )
        name = own_name
        names[name.casefold()] = located.where
        return name, _with_options(config, name, options)
    except ConfigError as error:
        name = name or _free_name(located, names)
        names.setdefault(name.casefold(), located.where)
        text = str(error)
        return name, ConfigError(
            text if located.where in text else f"{located.where}: {text}", "dataset_config"
        )


def _free_name(located: _LocatedEntry, names: Container[str]) -> str:
    """Return a name for an entry without one: its folder's name, else its position."""
    folder = located.entry.get("instance_data_dir") if isinstance(located.entry, dict) else None
    name = located.folder or (Path(folder).name if isinstance(folder, str) else "")
    if not name:
        return Path(located.where).name
    return name if name.casefold() not in names else f"{name} ({Path(located.where).name})"


def _split_name(entry: Entry) -> tuple[str, Entry]:
    """Split an entry into the subject's name and its settings."""
    options = dict(entry)
    folder = options.get("instance_data_dir")
    name = options.pop("name", None)
    if name is None:
        require(
            bool(folder) and not isinstance(folder, list),
            "it has neither a name nor a single folder to name it after; give it 'name:'",
        )
        name = Path(str(folder)).expanduser().absolute().name
    is_text = isinstance(name, str | int | float) and not isinstance(name, bool)
    require(is_text, f"the name {name} is not text; write it in quotes")
    name = str(name).strip()
    is_plain = name not in ("", ".", "..") and not set(name) & set('/\\:*?"<>|')
    require(
        is_plain and name.isprintable(),
        f"the name {quoted(name)} is not valid for a folder; choose another",
    )
    return name, options


def _with_options(config: TrainConfig, name: str, options: Entry) -> TrainConfig:
    values, shared = dict(options), dict[str, Any]()
    word = options.get("class_word") or config.class_word
    if word and options.get("instance_data_dir") and _lacks_prompt(options, config):
        token = str(options.get("token", config.token)).strip()
        values["instance_prompt"] = f"a photo of a {token} {word}"
    shared["output_dir"] = str(Path(config.output_dir) / name)
    if len(entries := by_folder(options)) > 1:
        del values["instance_data_dir"]
        folders = [entry["instance_data_dir"] for entry in entries]
        shared["dataset_config"] = [{"instance_data_dir": folder} for folder in folders]
    return dataclasses.replace(config, **read_values(values, _find), **shared)


def _find(name: str) -> Setting:
    """Look up a setting that subjects may have each."""
    require(name not in SHARED, f"all subjects share {name}; set it for the whole run", name)
    return find_training_setting(name, settings_by_name())
