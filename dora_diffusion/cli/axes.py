"""Axes of a grid: lists of values for settings of `generate`, and their product."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from functools import partial
from glob import glob
from itertools import product
from operator import methodcaller
from typing import Any

from dora_diffusion.cli.commands.parser import OTHER_NAMES, SWITCH_WORDS
from dora_diffusion.cli.settings import adapter_and_strengths
from dora_diffusion.config.fields import ConfigError, Setting, require
from dora_diffusion.config.flag_map import removal
from dora_diffusion.config.wording import did_you_mean, quoted
from dora_diffusion.formats.files.runs import ADAPTER_FILES

SIZE, REPLACE = "size", "replace"
_PARTS = {"unet_strength": 2, "text_encoder_strength": 1}
SPECIAL = (SIZE, REPLACE, *_PARTS)
"""Axes that are not settings."""

NO_AXES = (
    "output", "overwrite", "repeat", "num_images", "batch_size", "adapters_file",
    "offload", "grid", "grid_limit",
)  # fmt: skip
"""Settings that cannot be axes: they do not change an image, or make several."""

_NAMES = {**OTHER_NAMES, "prompt_s/r": REPLACE, "prompt_sr": REPLACE, "prompt_replace": REPLACE}
_PATHS = (
    "adapter",
    "base",
    "image",
    "mask_image",
    "model_config",
)
# Settings that each image requires.
_NEVER_NONE = ("prompt", "seed")
_RANGE, _MOST = "..", 10_000


@dataclass(frozen=True)
class Change:
    """Change of the settings by a value of an axis.

    Attributes:
        label: Text of the value.
        key: Key of the value; equal values have equal keys.
        targets: Names of the changed settings.
        apply: Returns settings with the value.
        acts: Returns whether the value can have an effect on settings.
        idle: Error message if no value of the axis has an effect.
        order: Changes of a lower order are applied first.
    """

    label: str
    key: Any
    targets: tuple[str, ...]
    apply: Callable[[Any], Any]
    acts: Callable[[Any], bool] = lambda settings: True
    idle: str = ""
    order: int = 0


@dataclass(frozen=True)
class Axis:
    """An axis: its name, and the change of settings by each value."""

    name: str
    changes: tuple[Change, ...]

    @property
    def labels(self) -> list[str]:
        """Text of each value."""
        return [change.label or "(empty)" for change in self.changes]


@dataclass(frozen=True)
class Grid:
    """Axes, and the `GenerateSettings` of each cell by its indices on the axes."""

    axes: tuple[Axis, ...]
    cells: Mapping[tuple[int, ...], Any]


def plan_grid(settings: Any) -> Grid:
    """Read the axes of ``grid`` and compute the settings of all cells.

    Args:
        settings: `GenerateSettings`.

    Raises:
        ConfigError: If an axis or value is not valid, or there are more cells than ``grid_limit``.
    """
    known = {setting.name: setting for setting in settings.settings()}
    axes = tuple(read_axis(word, known) for word in settings.grid)
    targets = [target for axis in axes for target in axis.changes[0].targets]
    twice = next((target for target in targets if targets.count(target) > 1), "")
    require(not twice, f"the grid has {twice} twice; give it one axis", "grid")
    count, limit = math.prod(len(axis.changes) for axis in axes), settings.grid_limit
    require(
        count <= limit,
        f"the grid has {count:,} images, more than grid_limit, {limit:,}; add --grid_limit {count} "
        "to make them, or leave values out",
        "grid_limit",
    )
    plain = settings.changed(grid=[], grid_limit=known["grid_limit"].default)
    idle, cells = dict[str, bool](), dict[tuple[int, ...], Any]()
    for index in product(*(range(len(axis.changes)) for axis in axes)):
        cell = plain
        changes = [axis.changes[at] for axis, at in zip(axes, index, strict=True)]
        for change in sorted(changes, key=lambda change: change.order):
            if change.idle:
                idle[change.idle] = idle.get(change.idle, True) and not change.acts(cell)
            cell = change.apply(cell)
        cells[index] = cell
    message = next((text for text, is_idle in idle.items() if is_idle), "")
    require(not message, message, "grid")
    return Grid(axes, cells)


def read_axis(text: str, known: Mapping[str, Setting]) -> Axis:
    """Read ``AXIS=VALUES``.

    Args:
        text: The text. Values are separated by commas, or by ``||`` if they contain commas. A
            trailing ``||`` is allowed.
        known: The command's settings by name.

    Raises:
        ConfigError: If the text has another form, or a value is not valid or repeated.
    """
    key, sign, values = text.partition("=")
    require(
        bool(sign and key.strip()),
        f"grid is {quoted(text)}; it must be AXIS=VALUES, such as 'strength=0.5, 0.75, .., 1.25'",
        "grid",
    )
    name = _known_name(key, known)
    # A trailing separator is allowed: a single value with a comma needs it.
    separator = "||" if "||" in values else ","
    words = [word.strip() for word in values.rstrip().removesuffix("||").split(separator)]
    former = next((word for word in words if re.search(r"^SKIP:|\s&\s+\w+\s*=", word)), None)
    require(
        former is None,
        f"the axis {name} has {former!r}: no value is skipped, and no axes move together, any "
        "more; leave the value out, or make a grid for each pair",
        "grid",
    )
    may_be_empty = name in ("negative_prompt", REPLACE)
    require(
        words != [""] and bool(words[0] or name != REPLACE) and (all(words) or may_be_empty),
        f"the axis {name} has an empty value: {quoted(text)}; put an axis with spaces in quotes",
        "grid",
    )
    try:
        changes = _changes(name, list(_expanded(name, words, known)), known)
    except ConfigError as error:
        raise ConfigError(f"the axis {name}: {error}", "grid") from error
    axis = Axis(f"{REPLACE} {quoted(words[0])}" if name == REPLACE else name, tuple(changes))
    keys = [change.key for change in changes]
    same = next((label for n, label in enumerate(axis.labels) if keys[n] in keys[:n]), None)
    require(
        same is None, f"the axis {axis.name} has the value {same!r} twice; leave one out", "grid"
    )
    return axis


def _known_name(text: str, known: Mapping[str, Setting]) -> str:
    """Return the name of the axis, for its name or an alias of other programs.

    Raises:
        ConfigError: If there is no such axis.
    """
    word = text.strip().lstrip("-").lower().replace("-", "_").replace(" ", "_")
    name = word if word in known else _NAMES.get(word, word)
    reason = "give its seeds with seed=1, 2, .., 4" if name == "num_images" else "leave it out"
    require(name not in NO_AXES, f"{name} is not an axis of a grid; {reason}", "grid")
    names = [*SPECIAL, *(name for name in known if name not in NO_AXES)]
    unknown = (
        f"the grid has no axis {text.strip()!r}{did_you_mean(word, names)}; an axis is a setting "
        f"of generate, or {', '.join(SPECIAL)}"
    )
    require(name in names, removal(word) or unknown, "grid")
    return name


def _expanded(name: str, words: Sequence[str], known: Mapping[str, Setting]) -> Iterator[str]:
    """Yield the values, with ranges and file patterns expanded.

    Raises:
        ConfigError: If a range has no step or misses its end, or a pattern matches no file.
    """
    is_number = name in _PARTS or (name in known and known[name].kind in (int, float))
    for at, word in enumerate(words):
        if word == _RANGE and is_number:
            yield from _between([*words[max(0, at - 2) : at], *words[at + 1 : at + 2]])
        elif name == "adapter" and "*" in word and " + " not in word:
            path, strengths = re.fullmatch(r"(.*?)((?::[-+.\deE]+){0,2})", word).groups()  # type: ignore[union-attr]
            matches = sorted(glob(path), key=_natural)
            require(bool(matches), f"{quoted(path)} matches no file or folder", "grid")
            yield from (match + strengths for match in matches)
        else:
            yield word


def _between(around: Sequence[str]) -> Iterator[str]:
    """Return the numbers of a range between its second and its last."""
    example = "write two numbers, '..' and the last one, such as 0.5, 0.75, .., 1.25"
    try:
        first, second, last = map(Decimal, around)
        count = (last - second) / (second - first)
        is_ahead = count > 0
    except (ValueError, ArithmeticError, InvalidOperation):
        raise ConfigError(f"the range has no step; {example}", "grid") from None
    require(not count > _MOST, f"the range to {last} has more than {_MOST:,} values", "grid")
    require(
        is_ahead and count == int(count),
        f"the range {first}, {second}, .. does not reach {last}; {example}",
        "grid",
    )
    return (f"{(second + n * (second - first)).normalize():f}" for n in range(1, int(count)))


def _natural(path: str) -> list[tuple[int, str]]:
    """Return a sort key that puts checkpoint-2 before checkpoint-10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", path)]


def _changes(name: str, words: Sequence[str], known: Mapping[str, Setting]) -> list[Change]:
    """Return the change of each value.

    Raises:
        ConfigError: If a value has the wrong type for the setting, or is out of its range.
    """
    if name == REPLACE:
        return [_replacement(words[0], word) for word in words]
    if name in _PARTS:
        need = f"the axis {name} needs an adapter, but none is given"
        numbers = [_value(replace(known["strength"], name=name), word) for word in words]
        return [
            Change(word, value, (name,), partial(_with_share, _PARTS[name], value),
                   lambda settings: bool(settings.adapter), need, 3)
            for word, value in zip(words, numbers, strict=True)
        ]  # fmt: skip
    if name == SIZE:
        sizes = [re.fullmatch(r"(\d{1,6})\s*[xX]\s*(\d{1,6})", word) for word in words]
        wrong = next((w for w, size in zip(words, sizes, strict=True) if not size), None)
        require(
            wrong is None, f"size is {wrong!r}; write width and height, such as 512x768", "grid"
        )
        pairs = [tuple(map(int, size.groups())) for size in sizes if size]
        return [
            Change(f"{width}x{height}", (width, height), ("width", "height"),
                   methodcaller("changed", width=width, height=height))
            for width, height in pairs
        ]  # fmt: skip
    values = [_value(known[name], word) for word in words]
    labels = _without_folders(words) if name in _PATHS else words
    return [
        Change(label, repr(value), (name,), methodcaller("changed", **{name: value}))
        for label, value in zip(labels, values, strict=True)
    ]


def _value(setting: Setting, word: str) -> Any:
    """Parse a value as on a command line; entries of a list are separated by `` + ``."""
    if word.lower() == "none" and setting.default is None and setting.name not in _NEVER_NONE:
        return None
    raw: Any = word
    if setting.kind is bool:
        raw = SWITCH_WORDS.get(word.lower(), word)
    elif setting.is_list:
        raw = [] if word.lower() == "none" else [part.strip() for part in word.split(" + ")]
    return setting.read(raw)


def _replacement(search: str, word: str) -> Change:
    """Return a change that replaces a word in prompt and negative prompt, as A1111 does."""

    def texts(settings: Any) -> dict[str, str]:
        pairs = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt}
        return {name: text for name, text in pairs.items() if search in text}

    def apply(settings: Any) -> Any:
        matches = texts(settings)
        return settings.changed(**{n: text.replace(search, word) for n, text in matches.items()})

    idle = f"the axis {REPLACE} does not find {search!r}, its first value, in the prompt"
    acts = lambda settings: bool(texts(settings))  # noqa: E731
    return Change(word, word, (f"{REPLACE} of {search!r}",), apply, acts, idle, 1)


def _with_share(part: int, value: float, settings: Any) -> Any:
    """Return settings with a strength of all adapters in field ``part`` of FILE:0.5:0.8."""
    words = []
    for word in settings.adapter or ():
        fields: list[Any] = [*adapter_and_strengths(word)]
        fields[part] = value
        words.append(":".join(map(str, fields)))
    return settings.changed(adapter=words) if words else settings


def _without_folders(words: Sequence[str]) -> list[str]:
    """Shorten paths to the last names that distinguish them, without folders of this machine.

    Adapters of runs and checkpoints have equal file names and are named by their folder.
    """
    entries = [word.split(" + ") for word in words]
    paths = list(dict.fromkeys(adapter_and_strengths(e)[0] for group in entries for e in group))
    segments = [re.split(r"[/\\]", path.rstrip("/\\")) for path in paths]
    segments = [part[:-1] if part[-1] in ADAPTER_FILES and part[:-1] else part for part in segments]
    cuts = (
        ["/".join(part[-n:]) for part in segments] for n in range(1, 1 + max(map(len, segments)))
    )
    names = dict(
        zip(paths, next((cut for cut in cuts if len({*cut}) == len(cut)), paths), strict=True)
    )
    labels = []
    for group in entries:
        files = [adapter_and_strengths(entry)[0] for entry in group]
        labels.append(" + ".join(names[p] + e[len(p) :] for p, e in zip(files, group, strict=True)))
    return labels
