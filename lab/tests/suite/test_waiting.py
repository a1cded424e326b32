"""Waiting for events, with an end for what hangs."""

from __future__ import annotations

import pytest

from tests import waiting
from tests.waiting import WAIT_SECONDS, wait_until


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of a wait, each of which passes for a minute."""
    made: list[float] = []
    monkeypatch.setattr(waiting.time, "sleep", made.append)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: 60 * len(made))
    return made


def test_what_is_seen_is_returned_at_once(pauses: list[float]) -> None:
    assert wait_until(lambda: [3]) == [3]
    assert pauses == []


def test_where_nothing_moves_a_wait_ends(pauses: list[float]) -> None:
    with pytest.raises(AssertionError, match="nothing moves any more: still"):
        wait_until(lambda: False, moved=lambda: "still")
    assert len(pauses) == pytest.approx(WAIT_SECONDS / 60, abs=1)
