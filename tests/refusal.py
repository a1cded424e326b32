"""Errors about a setting: a test names the setting, and leaves the sentence to its own test."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from dora_diffusion.config import ConfigError


@contextlib.contextmanager
def refused(
    setting: str, *words: str, kind: type[ConfigError] = ConfigError
) -> Iterator[pytest.ExceptionInfo[ConfigError]]:
    """Expect an error about a setting, in one line.

    Args:
        setting: Its name.
        words: What the line says besides, such as the value, where that is the point.
        kind: The exception.

    Raises:
        AssertionError: If there is none, or one about something else.
    """
    assert setting, "an error without a setting is matched by its words"
    with pytest.raises(kind) as info:
        yield info
    check(info.value, setting, *words)


def check(error: BaseException, setting: str, *words: str) -> None:
    """Assert that an error is about a setting, in one line with these words."""
    assert isinstance(error, ConfigError)
    line = str(error)
    assert error.setting == setting, f"it is about {error.setting or 'no setting'}: {line}"
    assert "\n" not in line, line
    for text in words:
        assert re.search(rf"(?<![\w]){re.escape(text)}", line), f"{text!r} is not in: {line}"
