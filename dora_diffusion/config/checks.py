"""What settings may hold: the error that says so, and the checks that raise it."""

from __future__ import annotations

from collections.abc import Sequence

from dora_diffusion.wording import did_you_mean


class ConfigError(ValueError):
    """A setting has a value that cannot work. The message names the setting and its value.

    Attributes:
        setting: Name of the setting that it is about, where there is one.
    """

    def __init__(self, message: str, setting: str = "") -> None:
        super().__init__(message)
        self.setting = setting


def require(condition: bool, message: str, setting: str = "") -> None:
    """Raise `ConfigError` unless a condition holds."""
    if not condition:
        raise ConfigError(message, setting)


def require_positive(name: str, value: float | None) -> None:
    """A number must be greater than 0; None passes."""
    require(value is None or value > 0, f"{name} is {value}; it must be greater than 0", name)


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """A word must be one of the choices."""
    require(
        value in choices,
        f"{name} is {value!r}; it must be one of {', '.join(choices)}"
        + did_you_mean(value, choices),
        name,
    )
