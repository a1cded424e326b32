"""Tests wait for events, with an end for what hangs, never by a machine's speed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import waiting
from tests.waiting import WAIT_SECONDS, wait_until

ROOT = Path(__file__).resolve().parents[1]
# Whose seconds pass at once: an event loop of their own.
VIRTUAL = "from tests.cluster.serving.helpers import run"
# Ends a pause that would go on for ever where all is well: a slow machine makes it prove less.
PAUSES = {"paused.wait(0.2)"}
# Whose limits are what is tested.
SETTINGS = {"deployment"}


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


def test_what_moves_is_waited_for_however_long(pauses: list[float]) -> None:
    assert wait_until(lambda: len(pauses) >= 1000, moved=lambda: len(pauses) // 10)


def test_where_nothing_moves_a_wait_ends(pauses: list[float]) -> None:
    with pytest.raises(AssertionError, match="nothing moves any more: still"):
        wait_until(lambda: False, moved=lambda: "still")
    assert len(pauses) == pytest.approx(WAIT_SECONDS / 60, abs=1)


def test_what_can_no_longer_come_is_not_waited_for(pauses: list[float]) -> None:
    def check() -> None:
        assert len(pauses) < 10, "it has failed"

    with pytest.raises(AssertionError, match="it has failed"):
        wait_until(lambda: len(pauses) > 100, check)
    assert len(pauses) == 10


LIMITED = {
    "acquire", "communicate", "join", "set_default_timeout", "sleep", "wait", "wait_for_timeout",
}  # fmt: skip
"""Names of functions that take a time as their first argument."""


def limits_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each time in which a machine must have done something."""
    tree = ast.parse(source)
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.search(r"\bsleep\(\d", str(node.value)):
            yield node.lineno, str(node.value)
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            times = [one.value for one in node.keywords if str(one.arg).startswith("timeout")]
            times += node.args[:1] if name in LIMITED else []
            times += node.args[1:2] if name == "wait_for" else []
            times = [values.get(one.id, one) if isinstance(one, ast.Name) else one for one in times]
            is_limit = [isinstance(one, ast.Constant) and _is_time(one.value) for one in times]
            if any(is_limit) and name not in SETTINGS:
                yield node.lineno, ast.unparse(node)


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("process.wait(60)", 1),
        ("process.communicate(timeout=2.5)", 1),
        ("page.wait_for_timeout(500)", 1),
        ("httpx.Client(timeout=60)", 1),
        ("subprocess.run(words, timeout_s=3)", 1),
        ("time.sleep(0.05)", 1),
        ("asyncio.wait_for(event.wait(), 60.0)", 1),
        ("LONG = 60\nprocess.wait(LONG)", 1),
        ("deployment(timeout=60)", 0),
        ("program = 'import time; time.sleep(60)'", 1),
        ("process.wait(WAIT_SECONDS)\nbarrier.wait()\nopen(timeout=None, wait=True)", 0),
        ("page.set_default_timeout(0)\n', '.join('ab')\npage.wait('#x')", 0),
    ],
)
def test_limits_are_found(source: str, count: int) -> None:
    assert len(list(limits_of(source))) == count


def test_no_test_depends_on_a_machine_s_speed() -> None:
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path not in (Path(__file__), Path(waiting.__file__)) and VIRTUAL not in source:
            where = path.relative_to(ROOT)
            limits = [(line, text) for line, text in limits_of(source) if text not in PAUSES]
            found += [f"{where}:{line}: {text}" for line, text in limits]
    assert found == []
