"""Every reason to skip a test stands in the table that says where it runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONG
from tests.skips import places, row_of, summary

TESTS = Path(__file__).parent


def texts(node: ast.expr) -> list[str]:
    """A text, or all that it may be; what is filled in is ``torchao``, a library of nobody."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = [
            texts(part)[0] if isinstance(part, ast.Constant) else "torchao" for part in node.values
        ]
        return ["".join(parts)]
    return []


def reasons_of(tree: ast.AST) -> Iterator[str]:
    """Reasons of a module, as a run shows them."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        reason = next((word.value for word in node.keywords if word.arg == "reason"), None)
        if name in ("skip", "skipif", "importorskip") and reason is not None:
            yield from texts(reason)
        elif name == "skip" and node.args:
            yield from texts(node.args[0])
        elif name == "importorskip":
            module = (texts(node.args[0]) or ["torchao"])[0]
            yield f"could not import {module!r}: No module named {module!r}"


def all_reasons() -> set[str]:
    found = {"there is no Chromium", "the embedded model is not there"}  # of tests/browser
    for path in TESTS.rglob("*.py"):
        if path != Path(__file__):
            found |= set(reasons_of(ast.parse(path.read_text(encoding="utf-8"))))
    return found


def test_every_reason_has_a_place_where_its_tests_run() -> None:
    rows, reasons = places(), all_reasons()
    assert len(reasons) > 40
    assert sorted(reason for reason in reasons if row_of(reason, rows) is None) == []
    used = {row_of(reason, rows) for reason in reasons}
    assert set(rows) == used


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
    first, second = summary([reason, "there is a GPU", reason])
    assert first.startswith(f"2 skipped: {reason}; runs in {place}")
    assert second == "1 skipped: there is a GPU; runs in `make test` on a machine without one"


def test_every_test_that_is_kept_for_later_is_there() -> None:
    """A test that was moved would run in every run again."""
    for name in LONG:
        path, _, function = name.partition("::")
        text = (TESTS / path).read_text(encoding="utf-8")
        assert f"def {function.partition('[')[0]}" in text, name
