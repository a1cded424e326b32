"""Examples of property tests: their number, beside the profiles of `conftest.py`, and files."""

from __future__ import annotations

from pathlib import Path

from hypothesis import settings


def at_least(examples: int) -> settings:
    """More examples than other property tests try in the suite; in the long run as many."""
    return settings(max_examples=max(examples, settings.default.max_examples))


def fresh(path: Path) -> Path:
    """Remove the file of the example before: to empty it would make ext4 wait for the disk."""
    path.unlink(missing_ok=True)
    return path
