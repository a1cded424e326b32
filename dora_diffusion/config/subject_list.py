"""Several subjects with an adapter each: one training's settings for every one of them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.dataset_file import by_folder, listed_entries, require_mapping
from dora_diffusion.config.fields import ConfigError, require
from dora_diffusion.config.file import read_config_file
from dora_diffusion.config.kohya import folder_name, folders_in
from dora_diffusion.config.run import DeviceSettings
from dora_diffusion.config.subject import Entry, ModelSettings
from dora_diffusion.config.train import TrainConfig, settings
from dora_diffusion.config.wording import counted, did_you_mean, listing, quoted

SUBJECT_FILE = "subject.yaml"
"""File of settings that a folder of photos may hold."""

SHARED = frozenset((
    *(source.name for group in (ModelSettings, DeviceSettings) for source in
      dataclasses.fields(group) if source.name != "seed"),
    "dataset_config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
))  # fmt: skip
"""Settings that all subjects have in common."""


@check_arguments(source=str | Path | Sequence[Any])
def subject_configs(
    source: str | Path | Sequence[Entry], config: TrainConfig
) -> dict[str, TrainConfig | ConfigError]:
    """The settings of a training for each subject, by its name.

    Args:
        source: A dataset file (YAML list, sd-scripts' TOML, kohya's folders), or a folder whose
            sub-folders hold the photos of a subject each. An entry has what is its own of all
            settings but those that are `SHARED`, and ``name``; without one it is called as its
            folder. A folder may hold a `SUBJECT_FILE` of such settings.
        config: What they have in common. Each gets ``OUTPUT_DIR/NAME`` as its output folder.

    Returns:
        Settings, or what is wrong with an entry, naming it: a setting is unknown, shared or wrong,
        the name is no folder's or another subject's, a folder has no class word and no prompt, or
        its file cannot be read. It is called as its folder then, if its name is what is wrong.

    Raises:
        ConfigError: If the source cannot be read, or every entry is wrong.

    Example:
        >>> entries = [{"name": "rex", "instance_data_dir": "photos/rex", "rank": 4}]
        >>> subject_configs(entries, TrainConfig(output_dir="out"))["rex"].rank
        4
    """
    require(
        not config.dataset_config,
        "dataset_config teaches several subjects to one adapter; leave it out where each subject "
        "has an adapter of its own",
        "dataset_config",
    )
    given = _entries(source, config)
    require(bool(given), f"{source or 'the list'} holds no subject", "subjects")
    _warn_of_lost(source, [each.entry for each in given], config)
    made: dict[int, tuple[str, TrainConfig | ConfigError]] = {}
    taken: dict[str, str] = {}
    # A name that a folder has comes before the same one that an entry gives to another.
    for place in sorted(range(len(given)), key=lambda place: _gives_name(given[place].entry)):
        made[place] = _subject(given[place], config, taken)
    errors = [value for _, value in made.values() if isinstance(value, ConfigError)]
    if len(errors) == len(made):
        more = f" (and {counted(len(errors) - 1, 'other subject')})" if errors[1:] else ""
        raise ConfigError(f"{made[0][1]}{more}", "dataset_config")
    return dict(made[place] for place in range(len(given)))


@dataclass(frozen=True)
class _Given:
    """An entry as it stands somewhere, or why it cannot be read."""

    where: str
    entry: Any
    folder: str = ""


def _entries(source: str | Path | Sequence[Entry], config: TrainConfig) -> list[_Given]:
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
        _Given(f"{file}, entry {place}", entry)
        for place, entry in enumerate(listed_entries(source, config.train_batch_size), 1)
    ]


def _plain_folder(folder: Path, config: TrainConfig) -> _Given:
    """A folder as an entry, with the settings of the file in it."""
    file = folder / SUBJECT_FILE
    where = str(file if file.is_file() else folder)
    try:
        own = read_config_file(file) if file.is_file() else {}
        require("instance_data_dir" not in own, "instance_data_dir is the file's own folder")
        require(
            not _lacks_prompt(own, config) or bool(own.get("class_word") or config.class_word),
            "there is no class word; give --class_word, or 'class_word: dog' in its "
            f"{SUBJECT_FILE}",
            "class_word",
        )
    except ConfigError as error:
        return _Given(where, error, folder.name)
    return _Given(where, {"instance_data_dir": str(folder), **own}, folder.name)


def _lacks_prompt(own: Entry, config: TrainConfig) -> bool:
    """Return whether a subject with a token has no prompt."""
    token = str(own.get("token", config.token)).strip()
    return bool(token) and not (own.get("instance_prompt") or config.instance_prompt)


def _warn_of_lost(
    source: str | Path | Sequence[Entry], entries: Sequence[Any], config: TrainConfig
) -> None:
    """Name the settings in common that every entry has for itself."""
    lost = [
        setting.name
        for setting in settings()
        if getattr(config, setting.name) != setting.default
        and all(isinstance(entry, dict) and setting.name in entry for entry in entries)
    ]
    if lost:
        file = source if isinstance(source, str | Path) else "subjects"
        warnings.warn(
            f"{listing(lost)} without effect: each entry of {file} has its own", stacklevel=3
        )


def _gives_name(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("name") is not None


def _subject(
    given: _Given, config: TrainConfig, taken: dict[str, str]
) -> tuple[str, TrainConfig | ConfigError]:
    """A subject's name and settings, or what is wrong with them; its name is taken then."""
    name = ""
    try:
        if isinstance(given.entry, ConfigError):
            raise given.entry
        require_mapping(given.entry)
        wanted, own = _named(given.entry)
        other = taken.get(wanted.casefold())
        require(
            other is None,
            f"the name {wanted!r} is that of {other} too; give it another 'name:'",
        )
        name = wanted
        taken[name.casefold()] = given.where
        return name, _with_own(config, name, own)
    except ConfigError as error:
        name = name or _free_name(given, taken)
        taken.setdefault(name.casefold(), given.where)
        text = str(error)
        return name, ConfigError(
            text if given.where in text else f"{given.where}: {text}", "dataset_config"
        )


def _free_name(given: _Given, taken: Container[str]) -> str:
    """Return the name of an entry without one of its own: its folder's, else by its position."""
    folder = given.entry.get("instance_data_dir") if isinstance(given.entry, dict) else None
    name = given.folder or (Path(folder).name if isinstance(folder, str) else "")
    if not name:
        return Path(given.where).name
    return name if name.casefold() not in taken else f"{name} ({Path(given.where).name})"


def _named(entry: Entry) -> tuple[str, Entry]:
    """The subject's name, and the entry without it."""
    own = dict(entry)
    folder = own.get("instance_data_dir")
    name = own.pop("name", None)
    if name is None:
        require(
            bool(folder) and not isinstance(folder, list),
            "it has no name, and not one folder that names it; give it 'name:'",
        )
        name = Path(str(folder)).expanduser().absolute().name
    is_text = isinstance(name, str | int | float) and not isinstance(name, bool)
    require(is_text, f"the name {name} is not text; write it in quotes")
    name = str(name).strip()
    is_plain = name not in ("", ".", "..") and not set(name) & set('/\\:*?"<>|')
    require(
        is_plain and name.isprintable(),
        f"the name {quoted(name)} cannot be that of a folder; choose another",
    )
    return name, own


def _with_own(config: TrainConfig, name: str, own: Entry) -> TrainConfig:
    known = {setting.name: setting for setting in settings()}
    if unknown := [f"{key}{did_you_mean(key, known)}" for key in own if key not in known]:
        raise ConfigError(f"there is no setting {listing(unknown)}")
    if shared := [key for key in own if key in SHARED]:
        raise ConfigError(f"all subjects share {listing(shared)}; set it for the whole run")
    folders = by_folder(own)
    values: dict[str, Any] = dict(own)
    word = own.get("class_word") or config.class_word
    if word and own.get("instance_data_dir") and _lacks_prompt(own, config):
        token = str(own.get("token", config.token)).strip()
        values["instance_prompt"] = f"a photo of a {token} {word}"
    if len(folders) > 1:
        values.pop("instance_data_dir")
        each = [{"instance_data_dir": part["instance_data_dir"]} for part in folders]
        values["dataset_config"] = each
    cast = {key: known[key].cast(value) for key, value in values.items()}
    return dataclasses.replace(config, **cast, output_dir=str(Path(config.output_dir) / name))
