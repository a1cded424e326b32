"""The suite's own runner: parts, failures that are run once more, and exit codes."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import IO

import pytest

from tests import suite
from tests.suite import ROOT, Report, main, parts
from tests.waiting import WAIT_SECONDS

WORKERS = ["-n", "2", "--dist", "worksteal"]
ONE = ["-p", "no:xdist"]
PASSES = "def test_passes(): pass\n"
FAILS = "def test_fails(): assert False\n"
# Fails as long as its file is not there.
FLAKY = """
from pathlib import Path
def test_is_flaky(tmp_path_factory):
    mark = Path(__file__).with_suffix(".mark")
    was_there = mark.exists()
    mark.touch()
    assert was_there
"""


def test_what_runs_alone_runs_in_one_process_and_only_there() -> None:
    folders = [str(ROOT / "tests/browser"), str(ROOT / "tests/cluster")]
    assert parts("2", "not slow", ["-q"]) == [
        [*WORKERS, "-m", "(not slow) and not alone", "-q"],
        [*ONE, "-m", "(not slow) and alone", "-q", *folders],
    ]
    (only,) = parts("2", "", ["tests/data", "-k", "crop"])
    assert only == [*WORKERS, "-m", "not alone", "tests/data", "-k", "crop"]
    for path in ("tests", "tests/browser/test_typed.py::test_x", "tests/cluster"):
        assert [one[-1] for one in parts("2", "", [path])] == [path, path]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty module of tests in a project of its own."""
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "FLAKY", tmp_path / "build" / "flaky.txt")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "test_module.py"
    path.touch()
    return path


FLAKY_NAME = "test_module.py::test_is_flaky"


@pytest.mark.parametrize(
    ("source", "code", "last", "flaky"),
    [
        (PASSES + FLAKY, 0, [f"FLAKY {FLAKY_NAME}", "2 passed, 0 failed, 0 skipped"],
         f"{FLAKY_NAME}\n"),
        (PASSES + FAILS, 1, ["FAILED test_module.py::test_fails", "1 passed, 1 failed, 0 skipped"],
         ""),
    ],
)  # fmt: skip
def test_a_failure_is_run_once_more(
    source: str, code: int, last: list[str], flaky: str, file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file.write_text(source, encoding="utf-8")
    assert main(["-n", "1", str(file)]) == code
    assert capfd.readouterr().out.splitlines()[-len(last) :] == last
    assert re.sub(r"[0-9:-]{5,10} ", "", suite.FLAKY.read_text(encoding="utf-8")) == flaky


def test_both_parts_run_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    both = threading.Barrier(2, timeout=WAIT_SECONDS)

    def run(arguments: list[str], output: IO[bytes] | None = None) -> Report:
        both.wait()
        if output is not None:
            assert arguments[:2] == ONE
            output.write(b"from a browser\n")
        return Report(0, [], {"passed": 2 if output is None else 3})

    monkeypatch.setattr(suite, "run_pytest", run)
    assert main([]) == 0
    last = ["from a browser", "", "5 passed, 0 failed, 0 skipped"]
    assert capfd.readouterr().out.splitlines() == last


@pytest.mark.parametrize(
    ("report", "is_broken"),
    [
        (Report(0, [], {}), False),
        (Report(1, ["a"], {}), False),
        (Report(5, [], {}), False),
        (Report(1, ["a"], {}, is_complete=False), True),  # -x: others were not run
        (Report(1, [], {}), True),  # an error that is no test's
        (Report(2, ["a"], {}), True),
        (Report(-9, [], {}), True),
    ],
)
def test_only_failed_tests_are_run_again(
    report: Report, is_broken: bool, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    assert report.is_broken == is_broken
    runs: list[object] = []

    def run(arguments: object, output: object = None) -> Report:
        runs.append(arguments)
        return report if len(runs) == 1 else Report(0, [], {})

    monkeypatch.setattr(suite, "run_pytest", run)
    assert main([str(file)]) == (report.code if report.code == 5 or is_broken else 0)
    assert len(runs) == 1 + (report.code == 1 and not is_broken)
