"""Dataset files: the subjects of a run, each the settings that are its own.

Three things are read as one list of entries: a YAML file of them, sd-scripts' dataset TOML, and a
folder of kohya's folders. What of a TOML cannot mean the same here is refused by name.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.config.fields import ConfigError, Setting, require
from dora_diffusion.config.file import read_yaml
from dora_diffusion.config.subject import ENTRY_SETTINGS, Entry
from dora_diffusion.wording import did_you_mean, listing, quoted

_KOHYA_FOLDER = re.compile(r"(\d+)_(.+)")
# Options of sd-scripts' subsets -> settings here.
_SAME = {
    "image_dir": "instance_data_dir",
    "num_repeats": "repeats",
    "resolution": "resolution",
    "enable_bucket": "aspect_ratio_buckets",
    "flip_aug": "random_flip",
    "shuffle_caption": "shuffle_tags",
    "keep_tokens": "keep_tags",
    "caption_dropout_rate": "caption_dropout",
    "caption_tag_dropout_rate": "tag_dropout",
    "caption_separator": "caption_separator",
    "enable_wildcard": "wildcards",
    "caption_prefix": "caption_prefix",
    "caption_suffix": "caption_suffix",
    "alpha_mask": "masked_loss",
}
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
# Those that are read below, and those that say how a cache is kept.
_READ = frozenset((
    "class_tokens", "is_reg", "random_crop", "batch_size", "caption_extension", "cache_info",
    "subsets",
))  # fmt: skip


@contextlib.contextmanager
def naming_entry(place: int, file: str = "dataset_config") -> Iterator[None]:
    """Name the entry, counted from 1, in errors of the block."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}, entry {place + 1}: {error}", "dataset_config") from error


def checked_entries(
    given: str | Path | Sequence[Any], known: Mapping[str, Setting], batch_size: int
) -> list[Entry]:
    """The entries of a dataset file, or those that are given, with their values in their types.

    An entry with several folders becomes one for each.

    Args:
        given: A YAML or TOML file, a folder of folders, or entries.
        known: All settings by name.
        batch_size: The run's, which a TOML may not contradict.

    Raises:
        ConfigError: If there is no entry, a key is no setting of a subject, or a value has the
            wrong type.
    """
    entries: list[Entry] = []
    for place, entry in enumerate(listed_entries(given, known, batch_size)):
        with naming_entry(place):
            require_mapping(entry)
            for values in by_folder(entry):
                _require_settings(values, known)
                entries.append({name: known[name].cast(values[name]) for name in values})
    return entries


def listed_entries(
    given: str | Path | Sequence[Any], known: Container[str], batch_size: int
) -> Sequence[Entry]:
    """The entries of a dataset file as they are written there, or those that are given.

    Raises:
        ConfigError: If it cannot be read, or is no list.
    """
    listed: Any = given
    if isinstance(given, str | Path):
        listed = _read(Path(given).expanduser(), known, batch_size)
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
        f"{quoted(str(entry))} is no subject; one begins with '- ' and a setting such as "
        "'instance_data_dir: photos/rex'",
    )


def by_folder(entry: Entry) -> list[Entry]:
    """An entry with several folders as one for each."""
    folders = entry.get("instance_data_dir")
    each = folders if isinstance(folders, list) else [folders]
    return [entry if folder is None else entry | {"instance_data_dir": folder} for folder in each]


def _require_settings(names: Iterable[str], known: Container[str]) -> None:
    """Refuse keys of an entry that are no settings of a subject."""
    for name in names:
        problem = f"there is no setting {name}{did_you_mean(name, ENTRY_SETTINGS)}"
        if name in known:
            problem = f"{name} is a setting of the whole run; give it beside dataset_config"
        require(name in ENTRY_SETTINGS, problem)


def _read(path: Path, known: Container[str], batch_size: int) -> Any:
    if path.is_dir():
        return _kohya_folders(path)
    if path.suffix.lower() != ".toml":
        return read_yaml(path)
    try:
        return _read_toml(path, known, batch_size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", "dataset_config") from error


def folders_in(folder: Path) -> list[Path]:
    """Its sub-folders, hidden ones left out.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}") from error


def is_of_kohya(folder: Path) -> bool:
    """Whether a folder is called as ``10_sks dog`` is: repeats, token and class."""
    return bool(_KOHYA_FOLDER.fullmatch(folder.name))


def _kohya_folders(folder: Path) -> list[Entry]:
    """The folders ``10_sks dog``: repeats, and what the captions of images without one are."""
    inner = folders_in(folder)
    named = {path: match for path in inner if (match := _KOHYA_FOLDER.fullmatch(path.name))}
    require(
        bool(named),
        f"dataset_config {folder} holds no folder such as '10_sks dog' (repeats, token and class)",
        "dataset_config",
    )
    if others := [path.name for path in inner if path not in named]:
        warnings.warn(
            f"{folder}: left out {listing(others, 5)}; a folder of a subject is called as '10_sks "
            "dog' is",
            stacklevel=2,
        )
    return [
        {"instance_data_dir": str(path), "repeats": int(match[1]), **_concept(path, match[2])}
        for path, match in named.items()
    ]


def _concept(folder: Path, prompt: str) -> Entry:
    """Prompt, token and class of a subject from its prompt, the token being the first word.

    Captions that never name it have no token: they are as they are.
    """
    token, _, class_word = prompt.strip().partition(" ")
    texts = [path.read_text("utf-8", errors="replace").lower() for path in folder.glob("*.txt")]
    if texts and not any(token.lower() in text for text in texts):
        token = ""
    return {"instance_prompt": prompt, "token": token, "class_word": class_word}


def _read_toml(path: Path, known: Container[str], batch_size: int) -> list[Entry]:
    """The subsets of sd-scripts' dataset file, each with its dataset's and the general options."""
    data = _parse_toml(path)
    unknown = [key for key in data if key not in ("general", "datasets")]
    require(not unknown, f"{', '.join(unknown)}: there are only [general] and [[datasets]]")
    entries: list[Entry] = []
    for dataset in data.get("datasets", []):
        above = {**data.get("general", {}), **dataset}
        subsets = [{**above, **subset} for subset in dataset.get("subsets", [])]
        _refuse_others(subsets, known, batch_size)
        subjects = [_subset(options) for options in subsets if not options.get("is_reg")]
        prior = _class_images([options for options in subsets if options.get("is_reg")])
        require(
            not prior or len({entry.get("class_word") for entry in subjects}) < 2,
            "is_reg beside subjects of several classes cannot mean the same here: write the list "
            "in YAML, with class_data_dir and class_prompt for each",
        )
        entries += [entry | prior for entry in subjects]
    require(bool(entries), "there is no [[datasets.subsets]] to train on")
    return entries


def _parse_toml(path: Path) -> dict[str, Any]:
    try:
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ImportError as error:
        raise ConfigError("Python 3.10 needs 'pip install tomli' to read TOML") from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"this is not valid TOML ({error})") from error
    return values


def _refuse_others(subsets: Sequence[Entry], known: Container[str], batch_size: int) -> None:
    """Refuse options that have no counterpart; those that are off or empty ask for nothing."""
    for options in subsets:
        asked = {name for name, value in options.items() if value not in (False, None, 0, "", [])}
        same = {name for name, setting in _SAME.items() if setting in known}
        refused = asked - same - _READ - _without_effect(options)
        if asked & {"shuffle_caption", "caption_tag_dropout_rate"}:
            # There they are part of the first and the last tag, which is shuffled and left out.
            refused |= asked & {"caption_prefix", "caption_suffix"}
        require(
            not refused,
            f"{', '.join(sorted(refused))} cannot mean the same here; take out what you can do "
            "without",
        )
        extension = str(options.get("caption_extension", ".txt")).lower()
        require(extension == ".txt", f"caption_extension {extension}: captions are .txt files here")
        size = options.get("batch_size", batch_size)
        require(
            size == batch_size, f"batch_size {size}: give the run --train_batch_size {size} too"
        )


def _without_effect(options: Entry) -> set[str]:
    """Options of buckets that change nothing: those without buckets, and the usual ones."""
    names = {"min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"}
    if not options.get("enable_bucket"):
        return names
    side = _side(options.get("resolution", 512))
    # Sides here are within a factor of 1.42 of the resolution, in steps of 64 pixels.
    usual = {
        "min_bucket_reso": 1.42 * options.get("min_bucket_reso", 0) <= side,
        "max_bucket_reso": options.get("max_bucket_reso", 2 * side) >= 1.42 * side,
        "bucket_reso_steps": options.get("bucket_reso_steps", 64) == 64,
    }
    return {name for name, is_usual in usual.items() if is_usual}


def _side(resolution: Any) -> int:
    """512 of ``512``, ``"512,512"`` or ``[512, 512]``.

    Raises:
        ConfigError: If it is no square.
    """
    given = resolution.split(",") if isinstance(resolution, str) else resolution
    sides = {int(side) for side in (given if isinstance(given, list) else [given])}
    require(len(sides) == 1, f"resolution {resolution}: training is at a square, or in buckets")
    return sides.pop()


def _subset(options: Entry) -> Entry:
    """The entry that a subset is."""
    require("image_dir" in options, "a [[datasets.subsets]] has no image_dir")
    entry = {setting: options[name] for name, setting in _SAME.items() if name in options}
    if "resolution" in entry:
        entry["resolution"] = _side(entry["resolution"])
    if "random_crop" in options:
        entry["center_crop"] = not options["random_crop"]
    if options.get("shuffle_caption") or options.get("caption_tag_dropout_rate"):
        entry.setdefault("keep_tags", 0)
    if options.get("enable_wildcard"):
        entry["caption_per_line"] = True
    return entry | _concept(Path(options["image_dir"]), options.get("class_tokens") or "")


def _class_images(regularisation: Sequence[Entry]) -> Entry:
    """The prior that a subset of regularisation images is; empty where there is none."""
    if not regularisation:
        return {}
    require(
        len(regularisation) == 1,
        "several is_reg subsets cannot mean the same here: write the list in YAML, with "
        "class_data_dir and class_prompt for each subject",
    )
    folder, prompt = regularisation[0].get("image_dir", ""), regularisation[0].get("class_tokens")
    images = [path for path in Path(folder).glob("*") if path.suffix.lower() in _IMAGES]
    require(bool(images), f"image_dir {folder!r} of is_reg holds no images")
    return {
        "with_prior_preservation": True,
        "prior_preservation_mode": "images",
        "class_data_dir": folder,
        "class_prompt": prompt,
        "num_class_images": len(images),
    }
