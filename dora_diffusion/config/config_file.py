"""Files of settings, in YAML; a file of another trainer is refused."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from dora_diffusion.config.file import read_values_of
from dora_diffusion.config.flag_map import without_removed
from dora_diffusion.config.foreign import require_own


def read_config_file(path: str | PathLike[str]) -> dict[str, Any]:
    """Read the settings in a YAML file, without removed ones that had no effect.

    Relative paths in it start at the working directory, in the ``config.yaml`` of a run at its
    folder.

    Raises:
        ConfigError: If the file is missing, is not YAML, sets a setting twice, does not hold a
            mapping, or is one of another trainer; the message names the file and the line.
    """
    return read_config_lines(path)[0]


def read_config_lines(path: str | PathLike[str]) -> tuple[dict[str, Any], Mapping[str, int]]:
    """Read the settings in a YAML file, and the line of each, counting from 1.

    Raises:
        ConfigError: As `read_config_file` does.
    """
    path = Path(path)
    require_own(path)
    values, lines = read_values_of(path)
    return without_removed(values), lines
