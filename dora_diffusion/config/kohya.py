"""Datasets of kohya's programs as entries: folders named ``10_sks dog``, sd-scripts' files.

Each option of sd-scripts' dataset files is read with the same result as in sd-scripts, refused by
name, or reported in a warning if it has no effect. Facts: its ``docs/config_README-en.md``,
``config_util.py`` and ``train_util.py`` of 2026.
"""

from __future__ import annotations

import codecs
import importlib
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.config.fields import WANTED, ConfigError, require
from dora_diffusion.config.file import read_facts
from dora_diffusion.config.problems import Problems
from dora_diffusion.config.subject import Entry
from dora_diffusion.config.wording import did_you_mean, listing, quoted

_FOLDER = re.compile(r"(\d+)_(.+)")
_GENERAL, _DATASETS, _SUBSETS = "[general]", "[[datasets]]", "[[datasets.subsets]]"
# Facts of each option: type of its value, the only tables that may hold it, and the equivalent
# setting. Options that are not supported have advice and the value that has no effect, options of
# buckets have sd-scripts' default. An option without facts changes nothing alone.
_OPTIONS = read_facts("config/kohya")
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "number": (int, float), "str": (str,), "sides": (int, list),
}  # fmt: skip


def _facts(name: str) -> dict[str, Any]:
    """Options that have this fact, with its value."""
    return {option: facts[name] for option, facts in _OPTIONS.items() if name in facts}


_TABLES, _BUCKETS, REFUSED = _facts("of"), _facts("usual"), _facts("instead")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")


def folders_in(folder: Path) -> list[Path]:
    """Return the sub-folders, without hidden ones.

    Raises:
        ConfigError: If the folder cannot be read.
    """
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}") from error


def folder_name(folder: Path) -> tuple[int, str] | None:
    """Repeats and text of a folder name such as ``10_sks dog``; None for other names."""
    match = _FOLDER.fullmatch(folder.name)
    return (int(match[1]), match[2]) if match else None


def folder_entries(folder: Path) -> list[Entry]:
    """Read folders such as ``10_sks dog``: repeats, and the caption of images without one.

    Raises:
        ConfigError: If there is no such folder.
    """
    inner = folders_in(folder)
    named = {path: name for path in inner if (name := folder_name(path))}
    hint = "; this is such a folder: give the one around it" if folder_name(folder) else ""
    require(
        bool(named),
        f"dataset_config {folder} holds no folder such as '10_sks dog' (repeats, token and class)"
        + hint,
        "dataset_config",
    )
    if ignored := [path.name for path in inner if path not in named]:
        warnings.warn(
            f"{folder}: left out {listing(ignored, 5)}; name a subject's folder like '10_sks dog'",
            stacklevel=2,
        )
    return [
        {"instance_data_dir": str(path), "repeats": repeats, **_concept(path, text)}
        for path, (repeats, text) in named.items()
    ]


def _concept(folder: Path, prompt: str) -> Entry:
    """Split a subject's prompt into token (the first word) and class.

    The token is empty if no caption contains it.
    """
    token, _, class_word = prompt.strip().partition(" ")
    texts = [path.read_text("utf-8", errors="replace").lower() for path in folder.glob("*.txt")]
    if texts and not any(token.lower() in text for text in texts):
        token = ""
    return {"instance_prompt": prompt, "token": token, "class_word": class_word}


def read_file(path: Path) -> Any:
    """Parse a TOML or JSON file.

    Raises:
        ConfigError: If the file cannot be read.
    """
    kind, text = path.suffix.lower().removeprefix(".").upper(), ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if kind == "JSON":
            return json.loads(text)
        tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        return tomllib.loads(text)
    except ImportError as error:
        raise ConfigError("Python 3.10 needs 'pip install tomli' to read TOML") from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        paths = "; write paths with / or \\\\, not with one \\" if "\\" in text else ""
        raise ConfigError(f"this is not valid {kind} ({error}){paths}") from error


def dataset_entries(data: Mapping[str, Any], batch_size: int) -> list[Entry]:
    """Convert sd-scripts' dataset file to entries: one for each subset, with inherited options.

    Args:
        data: The values of the file.
        batch_size: Batch size of the run; the file must not contradict it.

    Raises:
        ConfigError: If an option is unknown, in the wrong table, or not supported.

    Warns:
        UserWarning: If an option has no effect.
    """
    problems = Problems()
    datasets = _options_of(data, batch_size, problems)
    problems.raise_all()
    entries = list[Entry]()
    for subsets in datasets:
        with problems.collect():
            entries += _dataset(subsets)
    problems.raise_all()
    require(bool(entries), f"there is no {_SUBSETS} to train on")
    return entries


def _options_of(data: Mapping[str, Any], batch_size: int, problems: Problems) -> list[list[Entry]]:
    """Collect the options of each subset, by dataset, with the options of the outer tables.

    Problems of all tables and options are added to ``problems``.
    """
    datasets = list[list[Entry]]()
    unknown = [key for key in data if key not in ("general", "datasets")]
    with problems.collect():
        require(not unknown, f"{', '.join(unknown)}: there are only {_GENERAL} and {_DATASETS}")
    general = _table(data.get("general", {}), _GENERAL, problems)
    with problems.collect():
        for dataset in _tables(data.get("datasets", []), _DATASETS):
            options_of_dataset = {
                name: value for name, value in dataset.items() if name != "subsets"
            }
            inherited = {**general, **_table(options_of_dataset, _DATASETS, problems)}
            subsets = _tables(dataset.get("subsets", []), _SUBSETS)
            merged = [{**inherited, **_table(subset, _SUBSETS, problems)} for subset in subsets]
            datasets.append(list(_counted(merged, problems)))
            for options in datasets[-1]:
                _check_options(options, batch_size, problems)
    return datasets


def _tables(values: Any, table: str) -> Sequence[Mapping[str, Any]]:
    is_list = isinstance(values, list) and all(isinstance(value, dict) for value in values)
    brackets = "; write two brackets on each side of its name" if isinstance(values, dict) else ""
    require(is_list, f"{table} must be a list of tables{brackets}")
    tables: Sequence[Mapping[str, Any]] = values
    return tables


def _table(options: Any, table: str, problems: Problems) -> Entry:
    """Return the valid options of a table; sd-scripts allows some only in some tables."""
    with problems.collect():
        require(isinstance(options, dict), f"{table} must be a table of options")
    valid = Entry()
    for name, value in options.items() if isinstance(options, dict) else ():
        with problems.collect(f"{table}: "):
            _check_option(name, value, table)
            valid[name] = value
    return valid


def _check_option(name: str, value: Any, table: str) -> None:
    require(name in _OPTIONS, f"there is no option {name}{did_you_mean(name, _OPTIONS)}")
    kinds = _TYPES.get(_OPTIONS[name].get("type"), (object,))
    require(isinstance(value, kinds), f"{name} is {value!r}; it must be {WANTED.get(kinds[0])}")
    expected_table = {"datasets": _DATASETS, "subsets": _SUBSETS}.get(_TABLES.get(name, ""), table)
    is_misplaced = _SUBSETS in (table, expected_table) and expected_table != table
    require(not is_misplaced, f"{name} is an option of {expected_table}; move it there")


def _counted(subsets: Sequence[Entry], problems: Problems) -> Iterator[Entry]:
    """Yield the subsets that sd-scripts reads: for each ``image_dir`` only the first."""
    known = set()
    for options in subsets:
        folder = options.get("image_dir", "")
        with problems.collect():
            require(bool(folder), f"a {_SUBSETS} has no image_dir")
        reason = "num_repeats is less than 1" if options.get("num_repeats", 1) < 1 else ""
        reason = "this dataset has it already" if folder in known else reason
        if folder and reason:
            warnings.warn(f"image_dir {folder} is left out, as sd-scripts does: {reason}",
                          stacklevel=2)  # fmt: skip
            continue
        known.add(folder)
        yield options


def _dataset(subsets: Sequence[Entry]) -> list[Entry]:
    """The entries of one dataset."""
    problems = Problems()
    for options in subsets:
        with problems.collect():
            _require_images(options["image_dir"])
            _check_captions(options)
    problems.raise_all()
    subjects = [options for options in subsets if not options.get("is_reg")]
    entries = list[Entry]()
    for options in subjects:
        with problems.collect():
            entries.append(_subset(options))
    problems.raise_all()
    prior = _class_images([options for options in subsets if options.get("is_reg")], subjects)
    require(
        not prior or len({entry["class_word"] for entry in entries}) < 2,
        "is_reg with subjects of several classes is not supported: write the list in YAML, with "
        "class_data_dir and class_prompt for each",
    )
    return [entry | prior for entry in entries]


def _require_images(folder: str) -> None:
    path = Path(folder).expanduser()
    where = "" if path.is_absolute() else f" in {Path().absolute()}, the working directory"
    require(path.is_dir(), f"image_dir {folder!r} does not exist{where}; give a folder of images")


def _active_options(options: Entry) -> set[str]:
    """Names of the options with a value other than off or empty."""
    empty: tuple[Any, ...] = (False, 0, "", [], {})
    return {name for name, value in options.items() if value not in empty}


def _check_options(options: Entry, batch_size: int, problems: Problems) -> None:
    """Refuse options without an equivalent here."""
    active = _active_options(options)
    for problem in _unsupported(options, active):
        problems.add(ConfigError(problem))
    with problems.collect():
        require(
            bool(options.get("enable_bucket")) or "random_crop" not in active,
            "random_crop without enable_bucket is not supported: sd-scripts cuts it from the image "
            "at its full size; set enable_bucket = true, or remove it",
        )
    size = options.get("batch_size", batch_size)
    with problems.collect():
        require(
            size == batch_size, f"batch_size {size}: give the run --train_batch_size {size} too"
        )
    if (
        "cache_info" in active
        and Path(options.get("image_dir", ""), "metadata_cache.json").is_file()
    ):
        warnings.warn(
            f"cache_info has no effect: images and captions are read from {options['image_dir']}, "
            "not from its metadata_cache.json",
            stacklevel=4,
        )


def _unsupported(options: Entry, active: set[str]) -> Iterator[str]:
    """Yield messages about options that are not supported, or not together, with advice."""
    for name in sorted(active & {*REFUSED}):
        is_idle = name == "bucket_no_upscale" and not options.get("enable_bucket")
        if options[name] != _OPTIONS[name].get("neutral") and not is_idle:
            yield f"{name} is not supported: {REFUSED[name]}; remove it"
    tags = sorted(active & {"shuffle_caption", "caption_tag_dropout_rate"})
    if tags and "caption_prefix" in active:
        yield (
            f"caption_prefix with {tags[0]} is not supported: sd-scripts shuffles and drops it "
            "with the tags; write it into the captions, where keep_tokens keeps it in place"
        )
    separator = options.get("caption_separator", ",")
    if tags and separator != ",":
        yield (
            f"caption_separator {separator!r} is not supported: sd-scripts joins the tags by "
            "commas; separate them by commas"
        )


def _check_captions(options: Entry) -> None:
    """Refuse captions that sd-scripts reads in another way."""
    folder, draws = Path(options["image_dir"]).expanduser(), bool(options.get("enable_wildcard"))
    extension = options.get("caption_extension", ".caption")
    extension = f".{extension.removeprefix('.')}" if extension else ""
    prefix = options.get("caption_prefix", "")
    texts = [options.get("class_tokens", ""), prefix]
    images = [path for path in folder.glob("*") if path.suffix.lower() in _IMAGES]
    for image in sorted(images):
        _check_extension(image, extension)
        caption = image.with_suffix(".txt")
        if not caption.is_file():
            continue
        lines = caption.read_text("utf-8-sig", errors="replace").splitlines()
        several = len(list(filter(str.strip, lines))) > 1
        first = lines[0] if lines else ""
        require(
            draws or not lines or (bool(first.strip()) and not several),
            f"{caption}: sd-scripts reads its first line alone, {quoted(first)}; keep only that "
            "one, or set enable_wildcard = true, which draws one of them each time",
        )
        require(
            not (draws and several and prefix),
            f"{caption} has several lines, and sd-scripts puts caption_prefix before the first; "
            "write it into the lines",
        )
        texts += lines
    _warn_of_marks(folder, [image.with_suffix(".txt") for image in images])
    for text in texts if draws else ():
        require(
            not set("{}") & set(text),
            f"{folder}: with enable_wildcard, sd-scripts draws from the braces of {quoted(text)}; "
            "write each alternative out, as a line of the caption file",
        )


def _warn_of_marks(folder: Path, captions: Sequence[Path]) -> None:
    """Warn about captions with a byte order mark, which sd-scripts trains as a character."""
    files = [path for path in captions if path.is_file()]
    marked = [path.name for path in files if path.read_bytes().startswith(codecs.BOM_UTF8)]
    if marked:
        warnings.warn(
            f"{folder}: the byte order mark of {listing(marked, 3)} is left out; sd-scripts trains "
            "it as a character of the caption",
            stacklevel=5,
        )


def _check_extension(image: Path, extension: str) -> None:
    """Refuse caption files that only one of the two programs reads."""
    if extension == ".txt":
        return
    here = image.with_suffix(".txt")
    there = here.with_name(here.stem + extension)
    require(
        not there.is_file(),
        f"{there.name}: captions are .txt files here; rename them, and write caption_extension = "
        '".txt"',
    )
    require(
        not here.is_file(),
        f"{here.name} is not a caption in sd-scripts, whose caption_extension is {extension} here; "
        'write caption_extension = ".txt" to train on it, or move it away',
    )


def _side(resolution: Any) -> int:
    """Side of a square resolution: 512 for ``512`` or ``[512, 512]``.

    Raises:
        ConfigError: If the resolution is not a square.
    """
    sides = resolution if isinstance(resolution, list) else [resolution] * 2
    require(
        len(sides) == 2 and all(type(side) is int for side in sides),
        f"resolution is {resolution}; it must be one whole number, or width and height",
    )
    require(
        sides[0] == sides[1],
        f"resolution {resolution} is not supported: write the side of a square, such as "
        f"{math.isqrt(sides[0] * sides[1]) // 64 * 64 or 64}; enable_bucket = true gives images "
        "other shapes of its area",
    )
    side: int = sides[0]
    return side


def _subset(options: Entry) -> Entry:
    """Convert a subset to an entry."""
    entry = {here: options[name] for name, here in _facts("setting").items() if name in options}
    if "resolution" in entry:
        entry["resolution"] = _side(entry["resolution"])
    if "random_crop" in options:
        entry["center_crop"] = not options["random_crop"]
    defaults = _BUCKETS if options.get("enable_bucket") else {}
    entry |= defaults | {name: options[name] for name in _BUCKETS if name in options}
    if options.get("shuffle_caption") or options.get("caption_tag_dropout_rate"):
        entry.setdefault("keep_tags", 0)
    return entry | _concept(Path(options["image_dir"]), options.get("class_tokens") or "")


def _class_images(regularisation: Sequence[Entry], subjects: Sequence[Entry]) -> Entry:
    """Convert the subset of regularisation images to settings of the prior; empty without one."""
    if not regularisation:
        return {}
    require(
        len(regularisation) == 1,
        "several is_reg subsets are not supported: write the list in YAML, with class_data_dir and "
        "class_prompt for each subject",
    )
    options, folder = regularisation[0], regularisation[0]["image_dir"]
    images = [p for p in Path(folder).expanduser().glob("*") if p.suffix.lower() in _IMAGES]
    require(bool(images), f"image_dir {folder!r} of is_reg holds no images")
    require(
        bool(options.get("class_tokens")),
        f"image_dir {folder!r} of is_reg has no class_tokens, so that sd-scripts trains the empty "
        'caption where an image has none; give it the class, such as class_tokens = "dog"',
    )
    unread = _active_options(options) & {
        "alpha_mask", "caption_dropout_rate", "caption_prefix", "caption_tag_dropout_rate",
        "enable_wildcard", "shuffle_caption",
    }  # fmt: skip
    unread |= {"num_repeats"} if options.get("num_repeats", 1) > 1 else set()
    unread |= {
        name
        for name in ("flip_aug", "random_crop")
        if any(bool(subject.get(name)) != bool(options.get(name)) for subject in subjects)
    }
    if unread:
        warnings.warn(
            f"is_reg: {listing(unread)} of image_dir {folder} without effect: each image is "
            "trained with a class image of the same crop, whose caption is unchanged",
            stacklevel=5,
        )
    return {
        "with_prior_preservation": True,
        "prior_preservation_mode": "images",
        "class_data_dir": folder,
        "class_prompt": options["class_tokens"],
        "num_class_images": len(images),
    }
