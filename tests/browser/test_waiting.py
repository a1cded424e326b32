"""Ends of a wait for the app: a run that has failed, an app that has ended; no run that moves."""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_diffusion.studio.jobs.records import JobProgress
from tests import waiting


@pytest.fixture
def watched(
    app_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, list[int]]]:
    """An app whose one job is as a test says, look by look; each pause is a minute."""

    def make(state: Callable[[int], str], step: Callable[[int], int]) -> tuple[Any, list[int]]:
        app, looks = app_class(tmp_path / "runs"), [0]
        app._process = SimpleNamespace(poll=lambda: None, pid=1)

        def jobs() -> tuple[Any, ...]:
            at = looks[0]
            job = SimpleNamespace(
                id="1",
                title="sks mug",
                state=state(at),
                step=step(at),
                progress=JobProgress(),
                cause="cause",
            )
            return (job,)

        monkeypatch.setattr(app, "jobs", jobs)
        monkeypatch.setattr(urllib.request, "urlopen", lambda *_: io.BytesIO())
        clock = SimpleNamespace(sleep=lambda _: None, monotonic=lambda: 60 * looks[0])
        monkeypatch.setattr(waiting, "time", clock)  # and nobody else's
        return app, looks

    return make


def look_until(looks: list[int], at: int) -> Callable[[], bool]:
    def look() -> bool:
        looks[0] += 1
        return looks[0] >= at

    return look


def test_a_run_that_goes_on_is_waited_for_however_long(watched: Any) -> None:
    app, looks = watched(lambda at: "running", lambda at: at // 10)
    assert app.until(look_until(looks, 5000)) is True


def test_a_run_that_has_failed_is_not_waited_for(watched: Any) -> None:
    app, looks = watched(lambda at: "failed" if at > 20 else "running", lambda at: at)
    with pytest.raises(AssertionError, match="sks mug has failed: cause"):
        app.until(look_until(looks, 5000))
    assert looks == [21]


def test_a_run_that_a_test_ends_by_force_may_fail(watched: Any) -> None:
    app, looks = watched(lambda at: "crashed", lambda at: at)
    app.may_fail.add("1")
    assert app.until(look_until(looks, 30)) is True


def test_where_nothing_moves_a_wait_ends(watched: Any) -> None:
    app, looks = watched(lambda at: "running", lambda at: min(at, 7))
    with pytest.raises(AssertionError, match="nothing moves any more"):
        app.until(look_until(looks, 5000))
    assert looks[0] == pytest.approx(7 + waiting.WAIT_SECONDS / 60, abs=2)


def test_an_app_that_has_ended_is_not_waited_for(watched: Any) -> None:
    app, looks = watched(lambda at: "running", lambda at: at)
    app._process = SimpleNamespace(poll=lambda: 1, pid=1)
    with pytest.raises(AssertionError, match="the app has ended"):
        app.until(look_until(looks, 5000))
