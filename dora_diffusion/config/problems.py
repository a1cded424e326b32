"""Errors of several settings, reported together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dora_diffusion.config.fields import ConfigError


class Problems:
    """Collection of errors, which are raised as one.

    Args:
        kinds: Exceptions that are collected.

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
        """Collect the error of the block, if it has one.

        Args:
            prefix: Text before its message.
        """
        try:
            yield
        except self._kinds as error:
            self._cause = self._cause or error
            self.add(error, prefix)

    def add(self, error: Exception, prefix: str = "") -> None:
        """Add an error, as `collect` does."""
        parts = tuple(
            ConfigError(f"{prefix}{part}", part.setting) for part in getattr(error, "parts", ())
        )
        setting = getattr(error, "setting", "")
        self._errors.append(ConfigError(f"{prefix}{error}", setting, parts))

    def raise_all(self, setting: str = "") -> None:
        """Raise what was collected, each message once.

        Args:
            setting: The setting that it is about; default: that of the first one.

        Raises:
            ConfigError: With each of them in ``parts``.
        """
        errors = list({str(error): error for error in self._errors}.values())
        if not errors:
            return
        parts = [part for error in errors for part in (error.parts or [error])]
        if setting:
            parts = [ConfigError(str(part), setting) for part in parts]
        message = "; ".join(map(str, errors))
        raise ConfigError(message, setting or errors[0].setting, tuple(parts)) from self._cause


@contextmanager
def prefixed(prefix: str, setting: str = "") -> Iterator[None]:
    """Put a text before the message of the block's error.

    Args:
        prefix: The text.
        setting: The setting that it is about; default: as it is.

    Raises:
        ConfigError: With its parts, each with the text.
    """
    problems = Problems()
    with problems.collect(prefix):
        yield
    problems.raise_all(setting)
