"""Number of examples of a property test, beside the profiles of `conftest.py`."""

from __future__ import annotations

from hypothesis import settings


def at_least(examples: int) -> settings:
    """More examples than other property tests try in the suite; in the long run as many."""
    return settings(max_examples=max(examples, settings.default.max_examples))
