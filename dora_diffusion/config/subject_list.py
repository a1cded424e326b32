"""Several subjects with an adapter each: one training's settings for every one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.config.dataset_file import (
    by_folder,
    folders_in,
    is_of_kohya,
    listed_entries,
    naming_entry,
)
from dora_diffusion.config.fields import ConfigError, require, with_present_names
from dora_diffusion.config.file import read_config_file
from dora_diffusion.config.run import DeviceSettings
from dora_diffusion.config.subject import Entry, ModelSettings
from dora_diffusion.config.train import TrainConfig, settings
from dora_diffusion.wording import did_you_mean, listing, quoted

SUBJECT_FILE = "subject.yaml"
"""File of settings that a folder of photos may hold."""

SHARED = frozenset((
    *(source.name for group in (ModelSettings, DeviceSettings) for source in
      dataclasses.fields(group) if source.name != "seed"),
    "dataset_config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
))  # fmt: skip
"""Settings that all subjects have in common."""


def subject_configs(
    source: str | Path | Sequence[Entry], config: TrainConfig
) -> dict[str, TrainConfig]:
    """The settings of a training for each subject, by its name.

    Args:
        source: A dataset file (YAML list, sd-scripts' TOML, kohya's folders), or a folder whose
            sub-folders hold the photos of a subject each. An entry has what is its own of all
            settings but those that are `SHARED`, and ``name``; without one it is called as its
            folder. A folder may hold a `SUBJECT_FILE` of such settings.
        config: What they have in common. Each gets ``OUTPUT_DIR/NAME`` as its output folder.

    Raises:
        ConfigError: Naming the entry: if a setting is unknown, shared or wrong, the name is no
            folder's or another subject's, or a folder has no class word and no prompt.

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
    file = str(source) if isinstance(source, str | Path) else "subjects"
    made: dict[str, TrainConfig] = {}
    names: dict[str, int] = {}
    for place, entry in enumerate(_entries(source, config)):
        with naming_entry(place, file):
            name, own = _named(entry)
            other = names.setdefault(name.casefold(), place)
            require(
                other == place,
                f"the name {name!r} is that of entry {other + 1} too; give it another 'name:'",
            )
            made[name] = _with_own(config, name, own)
    require(bool(made), f"{file} holds no subject")
    return made


def _entries(source: str | Path | Sequence[Entry], config: TrainConfig) -> Sequence[Entry]:
    if isinstance(source, str | Path):
        folder = Path(source).expanduser()
        require(folder.exists(), f"{folder} does not exist; name a dataset file or a folder")
        inner = folders_in(folder) if folder.is_dir() else []
        if folder.is_dir() and not any(map(is_of_kohya, inner)):
            require(bool(inner), f"{folder} holds no folders; a subject is a folder of photos")
            return list(_plain_folders(inner, config))
    known = {setting.name for setting in settings()}
    return listed_entries(source, known, config.train_batch_size)


def _plain_folders(folders: Sequence[Path], config: TrainConfig) -> Iterator[Entry]:
    """Each folder as an entry, with the settings of the file in it, and a prompt."""
    for folder in folders:
        file = folder / SUBJECT_FILE
        own = read_config_file(file) if file.is_file() else {}
        require("instance_data_dir" not in own, f"{file}: instance_data_dir is its own folder")
        token = str(own.get("token", config.token)).strip()
        word = own.get("class_word") or config.class_word
        if token and not (own.get("instance_prompt") or config.instance_prompt):
            require(
                bool(word),
                f"{folder} has no class word; give --class_word, or 'class_word: dog' in {file}",
                "class_word",
            )
            own["instance_prompt"] = f"a photo of a {token} {word}"
        yield {"instance_data_dir": str(folder), **own}


def _named(entry: Entry) -> tuple[str, Entry]:
    """The subject's name, and the entry without it."""
    own = with_present_names(entry)
    folder = own.get("instance_data_dir")
    name = own.pop("name", None)
    if name is None:
        require(
            bool(folder) and not isinstance(folder, list),
            "it has no name, and not one folder that names it; give it 'name:'",
        )
        name = Path(str(folder)).expanduser().absolute().name
    name = str(name).strip()
    is_plain = name not in ("", ".", "..") and not set(name) & set('/\\:*?"<>|')
    require(is_plain, f"the name {quoted(name)} cannot be that of a folder; choose another")
    return name, own


def _with_own(config: TrainConfig, name: str, own: Entry) -> TrainConfig:
    known = {setting.name: setting for setting in settings()}
    if unknown := [f"{key}{did_you_mean(key, known)}" for key in own if key not in known]:
        raise ConfigError(f"there is no setting {listing(unknown)}")
    if shared := [key for key in own if key in SHARED]:
        raise ConfigError(f"{listing(shared)}: this all subjects have in common; give it beside")
    folders = by_folder(own)
    values: dict[str, Any] = dict(own)
    if len(folders) > 1:
        values.pop("instance_data_dir")
        each = [{"instance_data_dir": part["instance_data_dir"]} for part in folders]
        values["dataset_config"] = each
    cast = {key: known[key].cast(value) for key, value in values.items()}
    return dataclasses.replace(config, **cast, output_dir=str(Path(config.output_dir) / name))
