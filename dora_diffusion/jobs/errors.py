"""What is raised where a person asks for something that cannot be done."""

from __future__ import annotations

from pathlib import Path


class RequestError(ValueError):
    """It cannot be done as it was asked for; one plain line with what to do."""


class DamagedFile(RequestError):
    """A file of the runs folder is there and cannot be read, or does not hold what it should."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path.name} is damaged ({reason}); mend or delete it")
