"""Skipped tests, as a run lists them: by reason, with the place where they run."""

from __future__ import annotations

import pytest

from tests.skips import summary


@pytest.mark.parametrize(
    ("reason", "place"),
    [
        ("could not import 'ray': No module named 'ray'", "`make test`: `make test-bare`"),
        ("could not import 'pty': No module named 'pty'", "`make test`, except on Windows"),
        ("bitsandbytes is not installed", "`make test-newest UV_ARGS=bitsandbytes`"),
        ("prodigyopt is not installed", "`make test`: `make test-bare`"),
        ("a reason of nobody", "?"),
    ],
)
def test_a_run_ends_with_reasons_and_places(reason: str, place: str) -> None:
    first, second = summary([reason, "fp16 works here", reason])
    assert first.startswith(f"2 skipped: {reason}; runs in {place}")
    assert second == "1 skipped: fp16 works here; runs in `make test` without a GPU"
