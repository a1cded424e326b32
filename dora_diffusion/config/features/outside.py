"""Features from outside: a Python file of the user with settings and code of a feature."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from dora_diffusion.config import train
from dora_diffusion.config.fields import ConfigError


def with_features(*sources: str | PathLike[str] | type) -> Any:
    """Return a `TrainConfig` with further features, and their settings.

    Args:
        sources: Python files, which are run, or classes of settings with a `Feature`.

    Raises:
        ConfigError: If a file cannot be run, has no settings, or one of them exists already.

    Example:
        >>> kind = with_features("examples/features/log_gradients.py")
        >>> kind(log_gradients=10).features[0].on.setting
        'log_gradients'
    """
    groups, files = list[Any](), dict[Path, str]()
    for source in sources:
        if isinstance(source, type):
            groups.append(source)
            continue
        file = Path(source).expanduser()
        if file.name in (other.name for other in files):
            raise ConfigError(f"feature: two files are named {file.name}; rename one", "feature")
        files[file] = _read(file)
        groups += _groups_in(file, files[file])
    known = {*dir(train.TrainConfig), *train.settings_by_name(train.TrainConfig)}
    for group in groups:
        names = [field.name for field in dataclasses.fields(group)]
        if taken := next(filter(known.__contains__, names), ""):
            raise ConfigError(
                f"{_home(group)}: there is a setting {taken} already, or a part of TrainConfig "
                "with that name; give it another name",
                "feature",
            )
        known.update(names)
    own = [group for group in sources if isinstance(group, type)]
    classes = tuple(f"{group.__module__}.{group.__qualname__}" for group in own)
    members = {"files": files, "classes": classes}
    kind = type("TrainConfig", (train.TrainConfig, *groups), members)
    return dataclasses.dataclass(frozen=True, kw_only=True)(kind)


def _home(group: Any) -> str:
    return str(getattr(sys.modules.get(group.__module__), "__file__", None) or group.__name__)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"feature {file} cannot be read: {getattr(error, 'strerror', error)}; give the path of "
            "a Python file",
            "feature",
        ) from error


def _groups_in(file: Path, text: str) -> list[Any]:
    """Run the text of a file, and return its classes of settings with a feature."""
    name = f"_feature_{file.stem}"
    module = sys.modules[name] = ModuleType(name)  # Dataclasses look up the module of their class.
    module.__file__ = str(file)
    try:
        exec(compile(text, str(file), "exec"), vars(module))
    except Exception as error:
        place = place_in([file], error) or f"{file}: {type(error).__name__}: {error}"
        raise ConfigError(f"feature {place}", "feature") from error
    groups = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and "belongs_to" in vars(value) and value.__module__ == name
    ]
    if not groups or not all(map(dataclasses.is_dataclass, groups)):
        raise ConfigError(
            f"feature {file} has no settings; define a frozen dataclass with `heading` and "
            "`belongs_to`, as in examples/features",
            "feature",
        )
    return groups


def place_in(files: Iterable[Path], error: Exception) -> str:
    """Return where an error arose in one of some files, and the error; empty if in none."""
    names = {str(file.resolve()): file for file in files}
    if isinstance(error, SyntaxError) and error.filename:
        frames = [(error.filename, error.lineno)]
    else:
        frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    for name, line in reversed(frames):
        if file := names.get(str(Path(name).resolve())):
            return f"{file}, line {line}: {type(error).__name__}: {error}"
    return ""


@contextmanager
def features_of_command(words: Sequence[str]) -> Iterator[None]:
    """Use the features of a command line inside the block: of its flags, or of its settings file.

    Raises:
        ConfigError: As `with_features`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--feature", nargs="+")
    parser.add_argument("--config", "--config_file")
    given, _ = parser.parse_known_args(list(words))
    files = given.feature
    if files is None and given.config and Path(given.config).is_file():
        from dora_diffusion.config.config_file import read_config_file

        with suppress(ConfigError):  # The command reports it.
            files = read_config_file(given.config).get("feature")
    with train.using(with_features(*files)) if files else train.using(train.TrainConfig):
        yield
