"""Type checks of arguments of public functions and settings, by their annotations.

Annotations are resolved at the first call. An argument of the wrong type raises one error with its
name, its value and the expected type; an unknown argument raises an error that suggests the closest
name. NumPy scalars are converted to Python numbers.
"""

from __future__ import annotations

import inspect
import numbers
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from dora_diffusion.config.fields import WANTED, ConfigError
from dora_diffusion.config.wording import did_you_mean, listing, quoted

T = TypeVar("T", bound=Callable[..., Any])
_PRINTED = (bool, int, float, str, Path, NoneType)
# (class of the value, expected class) -> advice in the message.
_ADVICE = {
    ("Components", "Module"): "give one of its modules, such as components.denoiser",
    ("str", "Components"): "load it with load_components",
    ("int", "Sequence"): "write it in brackets",
    ("str", "Sequence"): "write it in brackets",
}


def check_arguments(
    elsewhere: Callable[[str], str] | None = None, /, **accepted: Any
) -> Callable[[T], T]:
    """Decorate a function or a class with checks of its arguments' types by their annotations.

    Args:
        elsewhere: Returns the text after an unknown name that belongs elsewhere; empty for others.
        accepted: Types of arguments that accept more than their annotations allow.

    Example:
        >>> @check_arguments()
        ... def double(number: int) -> int:
        ...     return 2 * number
        >>> double("2")
        Traceback (most recent call last):
        ...
        dora_diffusion.config.fields.ConfigError: number is '2'; it must be a whole number
    """

    def decorate(target: T) -> T:
        if not inspect.isclass(target):
            modules = [target.__module__]
            wrapper: T = _wrapped(target, target.__name__, accepted, modules, elsewhere)
            return wrapper
        kind: Any = target
        modules = [base.__module__ for base in kind.__mro__]
        kind.__init__ = _wrapped(kind.__init__, kind.__name__, accepted, modules, elsewhere)
        return target

    return decorate


def _wrapped(
    function: Any, name: str, accepted: Mapping[str, Any], modules: Sequence[str],
    elsewhere: Callable[[str], str] | None,
) -> Any:  # fmt: skip
    known, hints = inspect.signature(function).parameters, dict[str, Any]()
    positional = [
        key for key, parameter in known.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    variadic = next(
        (key for key, parameter in known.items() if parameter.kind is parameter.VAR_POSITIONAL),
        None,
    )
    has_keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())

    def checked(
        args: tuple[Any, ...], values: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(map(_python_number, args))
        values = {key: _python_number(value) for key, value in values.items()}
        if not has_keywords and (unknown := [word for word in values if word not in known]):
            names = [
                word + ((elsewhere and elsewhere(word)) or did_you_mean(word, known))
                for word in unknown
            ]
            raise ConfigError(f"{name} has no {listing(names)}", unknown[0])
        if not hints:
            annotations = {
                key: accepted.get(key, parameter.annotation) for key, parameter in known.items()
            }
            hints.update(_resolve(annotations, modules))
        # Python itself reports missing arguments and too many of them.
        arguments = [*zip(positional, args, strict=False), *values.items()]
        arguments += [
            (variadic, value) for value in args[len(positional) :] if variadic is not None
        ]
        for key, value in arguments:
            if key in hints and (problem := mismatch(key, value, hints[key])):
                raise ConfigError(problem, key)
        return args, values

    @wraps(function)
    def call(*args: Any, **values: Any) -> Any:
        args, values = checked(args, values)
        return function(*args, **values)

    return call


def _python_number(value: Any) -> Any:
    """Convert a NumPy scalar to a Python number, also in a list or dict; keep other values."""
    if type(value) is dict and any(map(_is_numpy, value.values())):
        return {key: _python_number(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_python_number, value)) if any(map(_is_numpy, value)) else value
    return value.item() if _is_numpy(value) else value


def _is_numpy(value: Any) -> bool:
    """Return whether a value is a NumPy scalar, without importing NumPy."""
    return type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()


def _resolve(annotations: Mapping[str, Any], modules: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Resolve annotations to types, except if they use names that only type checkers import."""
    scope = {k: v for name in reversed(modules) for k, v in vars(sys.modules[name]).items()}
    for name, hint in annotations.items():
        try:
            hint = eval(hint, scope) if isinstance(hint, str) else hint
        except NameError:
            continue
        if hint is not inspect.Parameter.empty:
            yield name, hint


def mismatch(name: str, value: Any, hint: Any) -> str:
    """Return an error message for a value that does not fit an annotation; empty if it fits.

    Only plain types, classes and collections of them are checked.
    """
    if _fits(value, hint):
        return ""
    for key, item, inner in _items(value, hint):
        if not _fits(item, inner):
            return mismatch(f"{name}[{key!r}]", item, inner)
    text = quoted(value) if isinstance(value, str) else str(value)
    if not isinstance(value, _PRINTED):
        text = f"of the type {type(value).__name__}"
    pairs = [
        (type(value).__name__, _class(alternative).__name__) for alternative in _alternatives(hint)
    ]
    advice = next((f": {_ADVICE[pair]}" for pair in pairs if pair in _ADVICE), "")
    return f"{name} is {text}; it must be {_expected(hint)}{advice}"


@cache
def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = get_origin(hint) in (Union, UnionType)
    return get_args(hint) if is_union else (NoneType if hint is None else hint,)


@cache
def _class(hint: Any) -> Any:
    """The class of an annotation; object if it is not a class."""
    kind = get_origin(hint) or hint
    return kind if inspect.isclass(kind) and kind is not Any else object


def _fits(value: Any, hint: Any) -> bool:
    if type(value) is hint:  # Fast path of most values.
        return True
    return any(_fits_one(value, one) for one in _alternatives(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    kind = _class(hint)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind in (tuple, list, Sequence, Collection):
        kind = Collection if kind is Collection else Sequence
        kind = () if isinstance(value, str | bytes) else kind
    try:
        is_right = isinstance(value, kind)
    except TypeError:  # a protocol
        return True
    return is_right and all(_fits(item, inner) for _, item, inner in _items(value, hint))


def _items(value: Any, hint: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield the items of a collection as (key, item, annotation)."""
    for one in _alternatives(hint):
        kind, args = _class(one), get_args(one)
        if args and isinstance(value, dict) and issubclass(kind, Mapping):
            yield from ((key, item, args[1]) for key, item in value.items())
        if args and isinstance(value, list | tuple) and issubclass(kind, Sequence):
            is_row = kind is tuple and args[-1] is not Ellipsis and len(args) == len(value)
            inner = args if is_row else args[:1] * len(value)
            yield from zip(range(len(value)), value, inner, strict=True)


def _expected(hint: Any, is_plural: bool = False) -> str:
    words = (_expected_one(one) for one in _alternatives(hint) if one is not NoneType)
    texts = list(dict.fromkeys(map(_plural, words) if is_plural else words))
    return " or ".join(texts + ["None"] * (NoneType in _alternatives(hint)))


def _plural(word: str) -> str:
    head, of, items = word.partition(" of ")
    return f"{head.removeprefix('a ')}s{of}{items}"


def _expected_one(hint: Any) -> str:
    kind, args = _class(hint), get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if kind in WANTED or kind is Callable:
        return WANTED.get(kind, "a function")
    inner = f" of {_expected(args[-1 if issubclass(kind, Mapping) else 0], True)}" if args else ""
    inner = "" if inner == " of objects" else inner
    if issubclass(kind, Mapping):
        return f"a mapping{inner.replace('of', 'to', 1)}"
    if issubclass(kind, Collection):
        return f"a list{inner}"
    return f"a {kind.__name__}"
