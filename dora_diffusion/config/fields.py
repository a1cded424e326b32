"""Description of a setting: the metadata of its dataclass field.

Flag, YAML key, help, range check, group, conditions and rules of resuming are all derived from it.
The module also translates names of precisions: torch's, Accelerate's, and common abbreviations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from dora_diffusion.config.wording import did_you_mean

AUTO = "auto"
_LONG = {"float": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_SHORT = {dtype: short for short, dtype in _LONG.items()}

DTYPES = tuple(_SHORT)
"""Values of ``--dtype``: torch's names."""


def dtype_name(word: str) -> str:
    """Torch's name of a precision: ``"bf16"`` -> ``"bfloat16"``; keeps other words."""
    return _LONG.get(word, word)


def precision_name(word: str) -> str:
    """Accelerate's name of a precision: ``"float32"`` -> ``"no"``; keeps other words."""
    short = _SHORT.get(word, word)
    return "no" if short in ("fp32", "none") else short


PRECISIONS = (AUTO, *map(precision_name, DTYPES))
"""Values of ``--mixed_precision``: Accelerate's names."""

TOKENS_PER_CHUNK = 75
"""Tokens that a CLIP encoder reads at once, without start and end token."""

# same: a resumed run must have the same value; free: it may change, which is logged and recorded;
# ignored: not a property of the training (folders, names, steps after training).
Resume = Literal["same", "free", "ignored"]

WANTED: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    PathLike: "a path",
}
REQUIRED: Any = dataclasses.MISSING
"""Default of a setting without a default value."""
T = TypeVar("T")


class TextOrPath(Generic[T]):
    """Annotation of a setting that is given as text or as a path, and is text afterwards."""

    if TYPE_CHECKING:  # Types of the field and of the argument, which dataclasses tell apart so.

        @overload
        def __get__(self, instance: None, owner: Any) -> Any: ...
        @overload
        def __get__(self, instance: object, owner: Any) -> T: ...
        def __get__(self, instance: Any, owner: Any) -> Any: ...
        def __set__(self, instance: Any, value: T | str | PathLike[str]) -> None: ...
    else:

        def __class_getitem__(cls, kind):
            return kind | str | PathLike[str]


TYPES: dict[str, type] = {"Entry": dict, **{kind.__name__: kind for kind in WANTED}}
# Classes of values that a setting accepts, where they are not its type alone.
_ACCEPTED: dict[type, Any] = {int: numbers.Integral, float: numbers.Real, Path: (str, PathLike)}


class ConfigError(ValueError):
    """A setting has a value that cannot work. The message names the setting and its value.

    Attributes:
        setting: Name of the setting, if there is one.
        parts: The single errors, if the error reports several.
    """

    def __init__(
        self, message: str, setting: str = "", parts: tuple[ConfigError, ...] = ()
    ) -> None:
        super().__init__(message)
        self.setting = setting
        self.parts = parts


def require(condition: bool, message: str, setting: str = "") -> None:
    """Raise `ConfigError` unless a condition holds."""
    if not condition:
        raise ConfigError(message, setting)


def python_number(value: Any) -> Any:
    """Convert a NumPy scalar to a Python number, also in a list or dict; keep other values."""
    if isinstance(value, dict):
        return {key: python_number(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(python_number, value))
    is_numpy = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if is_numpy else value


def require_positive(name: str, value: float | None) -> None:
    """Check that a number is greater than 0; None passes."""
    Setting(name, float, above=0).check(value)


def require_token_length(value: int) -> None:
    """Check that a token limit is a multiple of the chunk; 0 is no limit."""
    require(
        value >= 0 and value % TOKENS_PER_CHUNK == 0,
        f"max_token_length is {value}; it must be a multiple of {TOKENS_PER_CHUNK}, such as 75, "
        "150 or 225, or 0 for no limit",
        "max_token_length",
    )


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that a word is one of the choices."""
    if value not in choices:  # Checked first: the suggestion takes time to compute.
        message = f"{name} is {value!r}; it must be one of {', '.join(choices)}"
        raise ConfigError(message + did_you_mean(value, choices), name)


@dataclass(frozen=True)
class Need:
    """Condition that a setting has one of some values (without values: any true one)."""

    setting: str
    values: tuple[Any, ...] = ()

    def __call__(self, config: Any) -> str | None:
        """Return why the condition does not hold; None if it holds."""
        value = getattr(config, self.setting)
        if value in self.values if self.values else value:
            return None
        return f"{self.setting} is {shown(value)}"


@dataclass(frozen=True)
class AnyOf:
    """Condition that holds if at least one of several conditions holds."""

    needs: tuple[Condition, ...]

    def __call__(self, config: Any) -> str | None:
        """Return why no condition holds; None if one holds."""
        reasons = [need(config) for need in self.needs]
        return None if None in reasons else " and ".join(str(reason) for reason in reasons)


# Returns the reason why a setting has no effect; None if it has one.
Condition = Callable[[Any], "str | None"]


def when(holds: Callable[[Any], Any], reason: str) -> Condition:
    """Return a condition that holds where a predicate does, with the reason for other configs."""
    return lambda config: None if holds(config) else reason


def shown(value: Any) -> str:
    """Format a value as on a command line."""
    if value is None or value in ([], {}):
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(flag_words(value))


def flag_words(value: Any) -> list[str]:
    """Command-line words of a value; the words of a mapping are ``KEY=VALUE``."""
    if isinstance(value, dict):
        return [f"{key}={item}" for key, item in value.items()]
    return [str(item) for item in (value if isinstance(value, list | tuple) else [value])]


@dataclass(frozen=True)
class Setting:
    """One setting, read from its field.

    Attributes:
        name: Flag and YAML key.
        kind: Type of a single value.
        is_list: Whether it has several values.
        is_map: Whether the values form a mapping from patterns to values.
        default: Default value; `REQUIRED` if there is none.
        help: Help text, one sentence.
        group: Heading of its group.
        derived: Description of a default that depends on other settings or the model.
        choices: Valid values; None: any.
        resume: Rule for a changed value in a resumed run.
        needs: Conditions under which it has an effect.
        is_path: Whether the value is a path on this machine.
        above: Exclusive lower bound.
        least: Inclusive lower bound.
        most: Inclusive upper bound.
        below: Exclusive upper bound.
        flags: Flags, if they differ from ``--`` and the name.
        metavar: Placeholder of the value in the help.
        positional: Whether it is a positional argument, without a flag.
        repeated: Whether repeated flags add up to one list.
        aliases: Other names of choices, in lower case.
        refused: Words that look like a choice -> the choice to use instead.
        one_line: Whether white space in a text becomes single spaces.
        of_photos: Whether it has no effect in a run without photos.
        of_subject: Whether each subject of a run may have its own value.
        of_run: Whether subjects of a run have the default, not the run's value.
        has_photos: Whether it is a folder of a subject's photos.
        costs: Whether a feature's time or memory of a step depends on it.
        ends_run: Whether it acts after the last step, so that a finished run may change it.
        after: Setting that it follows, in whose group it is.
    """

    name: str
    kind: type
    is_list: bool = False
    default: Any = None
    help: str = ""
    group: str = ""
    derived: str = ""
    choices: tuple[str, ...] | None = None
    resume: Resume = "same"
    needs: tuple[Condition, ...] = ()
    is_path: bool = False
    above: float | None = None
    least: float | None = None
    most: float | None = None
    below: float | None = None
    flags: tuple[str, ...] = ()
    metavar: str = ""
    positional: bool = False
    repeated: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    is_map: bool = False
    one_line: bool = False
    of_photos: bool = False
    of_subject: bool = False
    of_run: bool = False
    has_photos: bool = False
    costs: bool = False
    ends_run: bool = False
    after: str = ""

    @classmethod
    def from_field(cls, source: dataclasses.Field[Any], **common: Any) -> Setting:
        """Read a field of a group of settings, with the common attributes of the group."""
        kind, is_list, is_map = setting_type(source)
        default = source.default
        if source.default_factory is not dataclasses.MISSING:
            default = source.default_factory()
        return cls(
            source.name, kind, is_list, default, is_map=is_map, **{**common, **source.metadata}
        )

    @property
    def is_required(self) -> bool:
        """True if the setting must be given."""
        return self.default is REQUIRED

    @property
    def flag(self) -> str:
        """The setting's first flag."""
        return self.flags[0] if self.flags else f"--{self.name}"

    @cached_property
    def default_text(self) -> str:
        if self.derived:
            return self.derived
        return "none" if self.default in (None, "", [], {}) else shown(self.default)

    def inactive_reason(self, config: Any) -> str | None:
        """Return why the setting has no effect in this config; None if it has one."""
        return next((reason for need in self.needs if (reason := need(config))), None)

    def check(self, value: Any) -> None:
        """Check a value's type, and its range or choice.

        Raises:
            ConfigError: If it cannot work, or is not a finite number.
        """
        self._require_value(value)
        if value is None or self.kind is dict:  # `dataset_file` checks the entries.
            return
        if self.is_map:
            require(
                isinstance(value, Mapping),
                f"{self.name} is {value!r}; it must be a mapping, of patterns to values",
                self.name,
            )
            value = list(value.values())
        if self.is_list:
            is_list = isinstance(value, list | tuple)
            require(is_list, f"{self.name} is {value!r}; it must be a list", self.name)
            for item in value:
                self._check_item(item)
            return
        if self.choices:
            if reason := self.refused.get(str(value).lower()):
                raise ConfigError(f"{self.name} cannot be {value!r}: {reason}", self.name)
            require_choice(self.name, value, self.choices)
        self._check_item(value)

    def _require_value(self, value: Any) -> None:
        require(
            value is not None or self.default is None,
            f"{self.name} is empty; give a value, or leave it out",
            self.name,
        )

    def _check_item(self, value: Any) -> None:
        """Check the type and the range of a single value."""
        problem = ""
        is_kind = isinstance(value, _ACCEPTED.get(self.kind, self.kind))
        if not is_kind or isinstance(value, bool) != (self.kind is bool):
            problem, value = f"be {WANTED[self.kind]}", repr(value)
        elif isinstance(value, float) and not math.isfinite(value):
            problem = "be a finite number"
        elif self.above is not None and not value > self.above:
            problem = f"be greater than {_bound(self.above)}"
        elif self.least is not None and not value >= self.least:
            problem = f"be at least {_bound(self.least)}" if self.least else "not be negative"
        elif self.most is not None and not value <= self.most:
            problem = f"be at most {_bound(self.most)}"
        elif self.below is not None and not value < self.below:
            problem = f"be less than {_bound(self.below)}"
        require(not problem, f"{self.name} is {value}; it must {problem}", self.name)

    def cast(self, value: Any) -> Any:
        """Cast a value from YAML or a command line; YAML reads 1e-4 as a string.

        Raises:
            ConfigError: If the value has another type, or is empty although a value is required.
        """
        self._require_value(value)
        if value is None or self.kind is dict:  # `dataset_file` casts the entries.
            return value
        items = value if isinstance(value, list | tuple) else [value]
        if self.is_map:
            pairs = value.items() if isinstance(value, dict) else map(self._pair, items)
            return {str(key): self._cast_item(item) for key, item in pairs}
        if self.is_list:
            return [self._cast_item(item) for item in items]
        return self._cast_item(value)

    def read(self, value: Any) -> Any:
        """Cast a value and check its range or choice.

        Raises:
            ConfigError: As `cast` and `check` do.
        """
        value = self.cast(value)
        self.check(value)
        return value

    def _pair(self, word: Any) -> tuple[str, str]:
        """Split ``"*.attn1.*=16"`` into pattern and value."""
        pattern, sign, value = str(word).rpartition("=")
        require(
            bool(pattern and sign),
            f"{self.name} is {word!r}; it must be PATTERN=VALUE, such as 'mid_block.*=16'",
            self.name,
        )
        return pattern, value

    def _cast_item(self, value: Any) -> Any:
        if value is False and "no" in (self.choices or ()):
            return "no"  # YAML reads a bare no as false.
        is_scalar = not isinstance(value, dict | list | tuple | set)
        item = None
        if is_scalar and isinstance(value, bool) == (self.kind is bool):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                item = self.kind(value)
        if self.kind is int and isinstance(value, float) and value != item:
            item = None
        expected = WANTED[self.kind]
        require(item is not None, f"{self.name} is {value!r}; it must be {expected}", self.name)
        return self._known_choice(item) if self.choices else item

    def _known_choice(self, value: Any) -> Any:
        """Normalize a choice: AdamW is adamw, fp32 is no, and none is None."""
        choices, word = self.choices or (), str(value).lower()
        if word == "none" and self.default is None:
            return None
        word = self.aliases.get(word, word)
        names = [word, precision_name(word), dtype_name(word)]
        names += [word.replace("_", "-"), word.replace("-", "_")]
        return next((name for name in names if name in choices), value)


def _bound(number: float) -> str:
    """A limit as a message shows it: a whole number with all its digits."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def in_order(settings: Iterable[Setting]) -> list[Setting]:
    """Move settings behind the one that they follow (`Setting.after`), and into its group."""
    own = list(settings)
    placed = [setting for setting in own if not setting.after]
    for setting in (setting for setting in own if setting.after):
        places = [i for i, one in enumerate(placed) if setting.after in (one.name, one.after)]
        first, last = (places[0], places[-1]) if places else (-1, len(placed) - 1)
        placed.insert(last + 1, dataclasses.replace(setting, group=placed[first].group))
    return placed


def flag(default: Any, text: str, **metadata: Any) -> Any:
    """Make the dataclass field of a setting.

    Args:
        default: Default value, or `REQUIRED`.
        text: Help text.
        metadata: Further attributes of `Setting`.
    """
    metadata = {"help": text, **metadata}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


free_flag = partial(flag, resume="free")
"""Make the field of a setting that a resumed run may change."""


def setting_type(source: dataclasses.Field[Any]) -> tuple[type, bool, bool]:
    """Return the type of a single value, whether there are several, and whether by pattern.

    ``list[str]`` -> ``(str, True, False)``; ``dict[str, int]`` -> ``(int, True, True)``.
    """
    name = re.sub(r"^TextOrPath\[(.*)\]$", r"\1", str(source.type)).removesuffix(" | None")
    is_map = name.startswith("dict[str, ")
    plain = name.removeprefix("dict[str, ").removeprefix("list[").removesuffix("]")
    return TYPES[plain], is_map or name.startswith("list["), is_map
