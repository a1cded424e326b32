"""Types of arguments, checked where Python callers come in: public functions and settings.

The annotations are read at the first call. An argument of another type is one error with its name,
what it is and what it must be; an unknown one names the nearest. Numbers of NumPy become Python's.
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
_SHOWN = (bool, int, float, str, Path, NoneType)
# What to give instead of a value of one class where there must be another.
_INSTEAD = {
    ("Components", "Module"): "give one of its modules, such as components.unet",
    ("str", "Components"): "load it with load_components",
    ("int", "Sequence"): "write it in brackets",
    ("str", "Sequence"): "write it in brackets",
}


def check_arguments(**accepted: Any) -> Callable[[T], T]:
    """Check the arguments of a function, or the fields of a class, by their annotations.

    Args:
        accepted: Types of arguments that accept more than their annotations say.

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
            made: T = _wrapped(target, target.__name__, accepted, [target.__module__])
            return made
        kind: Any = target
        modules = [base.__module__ for base in kind.__mro__]
        kind.__init__ = _wrapped(kind.__init__, kind.__name__, accepted, modules)
        return target

    return decorate


def _wrapped(function: Any, name: str, accepted: Mapping[str, Any], modules: Sequence[str]) -> Any:
    known, hints = inspect.signature(function).parameters, dict[str, Any]()
    placed = [key for key, own in known.items() if own.kind is own.POSITIONAL_OR_KEYWORD]
    rest = next((key for key, own in known.items() if own.kind is own.VAR_POSITIONAL), None)
    takes_any = any(own.kind is own.VAR_KEYWORD for own in known.values())

    def checked(
        args: tuple[Any, ...], values: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(map(_python_number, args))
        values = {key: _python_number(value) for key, value in values.items()}
        if not takes_any and (unknown := [word for word in values if word not in known]):
            names = [f"{word}{did_you_mean(word, known)}" for word in unknown]
            raise ConfigError(f"{name} has no {listing(names)}", unknown[0])
        if not hints:
            written = {key: accepted.get(key, own.annotation) for key, own in known.items()}
            hints.update(_read(written, modules))
        # Missing and surplus arguments are errors of Python's own.
        given = [*zip(placed, args, strict=False), *values.items()]
        given += [(rest, value) for value in args[len(placed) :] if rest is not None]
        for key, value in given:
            if key in hints and (problem := mismatch(key, value, hints[key])):
                raise ConfigError(problem, key)
        return args, values

    @wraps(function)
    def call(*args: Any, **values: Any) -> Any:
        args, values = checked(args, values)
        return function(*args, **values)

    return call


def _python_number(value: Any) -> Any:
    """A number or truth value of NumPy as Python's, also in a list or dict; all else unchanged."""
    if type(value) is dict and any(map(_is_numpy, value.values())):
        return {key: _python_number(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_python_number, value)) if any(map(_is_numpy, value)) else value
    return value.item() if _is_numpy(value) else value


def _is_numpy(value: Any) -> bool:
    """Return whether a value is one number of NumPy, which is not imported for it."""
    return type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()


def _read(written: Mapping[str, Any], modules: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield annotations as types, without annotations that only type checkers can import."""
    scope = {k: v for name in reversed(modules) for k, v in vars(sys.modules[name]).items()}
    for name, hint in written.items():
        try:
            hint = eval(hint, scope) if isinstance(hint, str) else hint
        except NameError:
            continue
        if hint is not inspect.Parameter.empty:
            yield name, hint


def mismatch(name: str, value: Any, hint: Any) -> str:
    """Return how a value differs from an annotation, naming it; empty if it does not.

    Only plain types, classes and collections of them are checked.
    """
    if _fits(value, hint):
        return ""
    for key, item, inner in _items(value, hint):
        if not _fits(item, inner):
            return mismatch(f"{name}[{key!r}]", item, inner)
    shown = quoted(value) if isinstance(value, str) else str(value)
    if not isinstance(value, _SHOWN):
        shown = f"of the type {type(value).__name__}"
    pairs = [(type(value).__name__, _class(one).__name__) for one in _alternatives(hint)]
    instead = next((f": {_INSTEAD[pair]}" for pair in pairs if pair in _INSTEAD), "")
    return f"{name} is {shown}; it must be {_wanted(hint)}{instead}"


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
    if type(value) is hint:  # most of them
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
    """The items of a collection, each with its key and annotation."""
    for one in _alternatives(hint):
        kind, args = _class(one), get_args(one)
        if args and isinstance(value, dict) and issubclass(kind, Mapping):
            yield from ((key, item, args[1]) for key, item in value.items())
        if args and isinstance(value, list | tuple) and issubclass(kind, Sequence):
            is_row = kind is tuple and args[-1] is not Ellipsis and len(args) == len(value)
            inner = args if is_row else args[:1] * len(value)
            yield from zip(range(len(value)), value, inner, strict=True)


def _wanted(hint: Any, is_plural: bool = False) -> str:
    words = (_wanted_one(one) for one in _alternatives(hint) if one is not NoneType)
    texts = list(dict.fromkeys(map(_plural, words) if is_plural else words))
    return " or ".join(texts + ["None"] * (NoneType in _alternatives(hint)))


def _plural(word: str) -> str:
    head, of, items = word.partition(" of ")
    return f"{head.removeprefix('a ')}s{of}{items}"


def _wanted_one(hint: Any) -> str:
    kind, args = _class(hint), get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if kind in WANTED or kind is Callable:
        return WANTED.get(kind, "a function")
    inner = f" of {_wanted(args[-1 if issubclass(kind, Mapping) else 0], True)}" if args else ""
    inner = "" if inner == " of objects" else inner
    if issubclass(kind, Mapping):
        return f"a mapping{inner.replace('of', 'to', 1)}"
    if issubclass(kind, Collection):
        return f"a list{inner}"
    return f"a {kind.__name__}"
