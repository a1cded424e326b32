"""Errors of several settings, reported together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from dora_diffusion.config.fields import ConfigError, Setting


class Problems:
    """Collection of errors that are raised as one error.

    Args:
        kinds: Exceptions to collect; default: `ConfigError`.

    Example:
        >>> problems = Problems()
        >>> for name in ("rnak", "seeed"):
        ...     with problems.collect():
        ...         raise ConfigError(f"there is no {name}")
        >>> problems.raise_all()
        Traceback (most recent call last):
        ...
        dora_diffusion.config.fields.ConfigError: there is no rnak; there is no seeed
    """

    def __init__(self, *kinds: type[Exception]) -> None:
        self._kinds = kinds or (ConfigError,)
        self._errors: list[ConfigError] = []
        self._cause: Exception | None = None

    @contextmanager
    def collect(self, prefix: str = "") -> Iterator[None]:
        """Collect the error that the block raises, if any.

        Args:
            prefix: Text before the message.
        """
        try:
            yield
        except self._kinds as error:
            self.add(error, prefix)

    def add(self, error: Exception, prefix: str = "") -> None:
        """Add an error, as `collect` does."""
        self._cause = self._cause or error
        single_errors = tuple(
            ConfigError(f"{prefix}{single}", single.setting)
            for single in getattr(error, "parts", ())
        )
        setting = getattr(error, "setting", "")
        self._errors.append(ConfigError(f"{prefix}{error}", setting, single_errors))

    def raise_all(self, setting: str = "") -> None:
        """Raise the collected errors as one, without repeated messages; none: do nothing.

        A single error is raised as it is.

        Args:
            setting: Setting of the error; default: the setting of the first one.

        Raises:
            ConfigError: With the single errors in ``parts``.
        """
        errors = list({str(error): error for error in self._errors}.values())
        if not errors:
            return
        if len(errors) == 1 and not setting and str(self._cause) == str(errors[0]):
            raise cast(Exception, self._cause)
        single_errors = [single for error in errors for single in (error.parts or [error])]
        if setting:
            single_errors = [ConfigError(str(single), setting) for single in single_errors]
        message = "; ".join(map(str, errors))
        raise ConfigError(
            message, setting or errors[0].setting, tuple(single_errors)
        ) from self._cause


def read_values(
    values: Mapping[str, Any],
    find: Callable[[str], Setting],
    prefix: Callable[[str], str] = lambda name: "",
) -> dict[str, Any]:
    """Read the values of settings, and report all problems together.

    Args:
        values: Uncast values by key.
        find: Returns the setting of a key, or raises `ConfigError`.
        prefix: Returns the text before a message about a key.

    Returns:
        Name of each setting -> its value.

    Raises:
        ConfigError: If a key is not a setting, or a value is not valid.
    """
    settings, problems = dict[str, Any](), Problems()
    for key, value in values.items():
        with problems.collect(prefix(key)):
            setting = find(key)
            settings[setting.name] = setting.read(value)
    problems.raise_all()
    return settings


@contextmanager
def prefixed(prefix: str, setting: str = "") -> Iterator[None]:
    """Put a text before the message of the block's error.

    Args:
        prefix: The text.
        setting: Setting of the error; default: unchanged.

    Raises:
        ConfigError: With the text before the message and before each part.
    """
    problems = Problems()
    with problems.collect(prefix):
        yield
    problems.raise_all(setting)


def naming_entry(index: int) -> AbstractContextManager[None]:
    """Name the entry of ``dataset_config`` in errors of the block, counting from 1."""
    return prefixed(f"dataset_config, entry {index + 1}: ", "dataset_config")
