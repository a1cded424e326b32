"""Rules on the tests: what they read, wait for, skip, and leave to longer runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.skips import PAGE, places, row_of
from tools.rules.sources import ROOT, Repository, Source


def tests_read_files_of_the_clone(repository: Repository) -> Iterator[str]:
    named = re.compile(r"parents\[\d\] / ['\"](\w+)['\"]")
    for source in repository.tests:
        for match in named.finditer(source.text):
            if not (ROOT / match[1]).exists():
                message = f"reads {match[1]}, which is not in the clone; make what it needs"
                yield source.problem(source.line_of(match.start()), message)


# Whose seconds pass at once: an event loop of their own.
VIRTUAL = "from tests.cluster.serving.helpers import run"
# Ends a pause that would go on for ever where all is well: a slow machine makes it prove less.
PAUSES = {"paused.wait(0.2)"}
# Whose limits are what is tested.
SETTINGS = {"serve_settings"}
LIMITED = {
    "acquire", "communicate", "join", "set_default_timeout", "sleep", "wait", "wait_for_timeout",
}  # fmt: skip
"""Names of functions that take a time as their first argument."""


def tests_wait_for_events(repository: Repository) -> Iterator[str]:
    """With an end for what hangs, never by a machine's speed."""
    for source in repository.tests:
        homes = ("tests/waiting.py", "lab/tests/tools/test_rules.py")
        if source.path not in homes and VIRTUAL not in source.text:
            for node, text in _limits(source):
                if text not in PAUSES:
                    yield source.problem(node, f"{text}: wait for an event (tests/waiting.py)")


def _limits(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Each time in which a machine must have done something, and its text."""
    values = {
        target.id: node.value
        for node in source.tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in source.nodes(ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        times = [one.value for one in node.keywords if str(one.arg).startswith("timeout")]
        times += node.args[:1] if name in LIMITED else []
        times += node.args[1:2] if name == "wait_for" else []
        times = [values.get(one.id, one) if isinstance(one, ast.Name) else one for one in times]
        is_limit = [isinstance(one, ast.Constant) and _is_time(one.value) for one in times]
        if any(is_limit) and name not in SETTINGS:
            yield node, ast.unparse(node)
    yield from ((node, text) for node, text in source.strings() if re.search(r"\bsleep\(\d", text))


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


def skips_stand_in_the_table(repository: Repository) -> Iterator[str]:
    """Every reason to skip a test has a row, which states where it runs, and each row a reason."""
    page = PAGE.relative_to(ROOT).as_posix()
    rows = places()
    used = {
        row_of(reason, rows)
        for reason in ("there is no Chromium", "the embedded model is not there")
    }
    for source in repository.tests:
        if source.path != "lab/tests/tools/test_rules.py":
            for node, reason in _reasons(source):
                row = row_of(reason, rows)
                used.add(row)
                if row is None:
                    yield source.problem(node, f"{reason!r} is in no row of {page}; add one")
    for row in rows.keys() - used:
        yield f"{page}:1: no test has the reason {row!r}; remove it from the table"


def _reasons(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Reasons of a module, as a run shows them."""
    for node in source.nodes(ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name not in ("skip", "skipif", "importorskip"):
            continue
        reason = next((word.value for word in node.keywords if word.arg == "reason"), None)
        texts: list[str] = []
        if reason is not None:
            texts = _texts(reason)
        elif name == "skip" and node.args:
            texts = _texts(node.args[0])
        elif name == "importorskip":
            module = (_texts(node.args[0]) or ["torchao"])[0]
            texts = [f"could not import {module!r}: No module named {module!r}"]
        for text in texts:
            yield node, text


def _texts(node: ast.expr) -> list[str]:
    """A text, or what it may be; what is filled in is ``torchao``, a library of nobody."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = [str(p.value) if isinstance(p, ast.Constant) else "torchao" for p in node.values]
        return ["".join(parts)]
    return []


def tests_kept_for_later_are_there(repository: Repository) -> Iterator[str]:
    """A test that was moved would run in every run again."""
    source = repository.files["tests/conftest.py"]
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LONG":
            for name in ast.literal_eval(node.value):
                path, _, function = name.partition("::")
                if f"def {function.partition('[')[0]}(" not in repository.text(f"tests/{path}"):
                    yield source.problem(node, f"{name} is not there; name where it went")


def property_tests_leave_examples_to_profiles(repository: Repository) -> Iterator[str]:
    own = re.compile(r"@settings\(|@seed\(|max_examples|derandomize")
    homes = (
        "tests/conftest.py", "tests/properties.py", "lab/tests/suite/test_properties.py",
        "lab/tests/tools/test_rules.py",
    )  # fmt: skip
    for source in repository.tests:
        if source.path not in homes:
            for match in own.finditer(source.text):
                line = source.line_of(match.start())
                yield source.problem(line, f"{match[0]}: use at_least of tests/properties.py")
