"""Run the suite: in several workers, in a process with the browser, and failures once more.

    python -m tests.suite [-n WORKERS] [-m MARKERS] [pytest arguments]

1. Tests in several workers. Tests marked `alone`, which start a browser or a cluster, run at the
   same time in one process, whose output follows.
2. Each test that failed once more, alone, in a process of its own.

A test that fails and then passes does not fail the run. It is printed as ``FLAKY`` in the last
lines and added to build/flaky.txt. A test that fails twice fails the run, as does any other
error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
FLAKY = ROOT / "build" / "flaky.txt"
ALONE = {"tests/browser": "", "tests/cluster": "ray"}
"""Folders of tests that run in a process of their own, and their marker, or "" for all of them."""
MOST_RERUNS = 10
"""More failures than this are not chance, and none is run again."""
PASSED, FAILED, NO_TESTS = 0, 1, 5


@dataclass
class Report:
    """Results of one run of pytest.

    Attributes:
        code: Exit code of pytest.
        failed: Node ids of failed tests, or paths of modules that could not be imported.
        counts: Numbers of tests by outcome.
        is_complete: False if the run stopped early, as with ``-x``.
    """

    code: int
    failed: list[str]
    counts: dict[str, int]
    is_complete: bool = True

    @property
    def is_broken(self) -> bool:
        """True if the run ended by anything but passed and failed tests."""
        failed = self.code == FAILED and bool(self.failed) and self.is_complete
        return self.code not in (PASSED, NO_TESTS) and not failed


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--report", type=Path, help="Write failed tests and counts to this file.")


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Write the report of the process that prints, for `run_pytest`."""
    stats = terminalreporter.stats
    failed = [report.nodeid for report in (*stats.get("failed", ()), *stats.get("error", ()))]
    report = {
        "failed": list(dict.fromkeys(failed)),
        "counts": {outcome: len(reports) for outcome, reports in stats.items() if outcome},
        "is_complete": not terminalreporter._session.shouldfail,
    }
    config.option.report.write_text(json.dumps(report), encoding="utf-8")


def run_pytest(arguments: Sequence[str], output: IO[bytes] | None = None) -> Report:
    """Run pytest in a process of its own, with this module as a plugin.

    Args:
        arguments: Arguments of pytest.
        output: File that takes what pytest prints; None prints it at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", "-p", "tests.suite", "--report", str(file)]
        code = subprocess.run([*command, *arguments], cwd=ROOT, stdout=output).returncode
        if not file.exists():  # pytest was killed, or did not understand its arguments
            return Report(code or FAILED, [], {})
        return Report(code, **json.loads(file.read_text(encoding="utf-8")))


def parts(workers: str, markers: str, arguments: Sequence[str]) -> list[list[str]]:
    """Arguments of pytest for each part of the suite: the workers, then the process alone."""

    def only(marker: str) -> list[str]:
        return ["-m", f"({markers}) and {marker}" if markers else marker]

    together = ["-n", workers, "--dist", "worksteal", *only("not alone"), *arguments]
    alone = ["-p", "no:xdist", *only("alone"), *arguments]
    paths = [ROOT / word.partition("::")[0] for word in arguments]
    paths = [path for path in paths if path.exists()]
    folders = [ROOT / folder for folder in ALONE]
    if not paths:
        return [together, [*alone, *map(str, folders)]]
    is_named = any(
        path.is_relative_to(folder) or folder.is_relative_to(path)
        for path in paths for folder in folders
    )  # fmt: skip
    return [together, alone] if is_named else [together]


def run_together(parts: Sequence[Sequence[str]]) -> list[Report]:
    """Run parts at the same time; the output of all but the first one is printed at the end."""
    with ThreadPoolExecutor() as pool, tempfile.TemporaryFile() as file:
        reports = list(pool.map(run_pytest, parts, [None, file]))
        file.seek(0)
        print(file.read().decode("utf-8", "replace"), end="", flush=True)
    return reports


def run_again(failed: Iterable[str]) -> tuple[list[str], list[str]]:
    """Run each test alone; those that pass now, and those that fail twice."""
    flaky, broken = [], []
    for test in failed:
        print(f"\nonce more, alone: {test}", flush=True)
        report = run_pytest(["-p", "no:xdist", "-m", "", test])
        (flaky if report.code == PASSED else broken).append(test)
    return flaky, broken


def summary(reports: Iterable[Report], flaky: Sequence[str], broken: Sequence[str]) -> list[str]:
    """The last lines of a run; a flaky test counts as passed."""
    counts = {"passed": len(flaky), "failed": len(broken), "skipped": 0}
    for report in reports:
        for outcome in ("passed", "skipped"):
            counts[outcome] += report.counts.get(outcome, 0)
    lines = [f"FLAKY {test}" for test in flaky] + [f"FAILED {test}" for test in broken]
    return [*lines, ", ".join(f"{count} {outcome}" for outcome, count in counts.items())]


def main(words: Sequence[str] | None = None) -> int:
    """Run the suite; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("-n", dest="workers", default="auto")
    parser.add_argument("-m", dest="markers", default="not slow")
    options, arguments = parser.parse_known_args(words)
    FLAKY.parent.mkdir(exist_ok=True)
    FLAKY.touch()
    time = datetime.now()
    reports = run_together(parts(options.workers, options.markers, arguments))
    for report in reports:
        if report.is_broken:
            return report.code
    failed = [test for report in reports for test in report.failed]
    flaky, broken = ([], failed) if len(failed) > MOST_RERUNS else run_again(failed)
    with FLAKY.open("a", encoding="utf-8") as file:
        file.writelines(f"{time:%Y-%m-%d %H:%M} {test}\n" for test in flaky)
    print("", *summary(reports, flaky, broken), sep="\n", flush=True)
    if len(failed) > MOST_RERUNS:
        print(f"{len(failed)} tests failed; none was run again, since that is not chance")
    if all(report.code == NO_TESTS for report in reports):
        return NO_TESTS
    return FAILED if broken else PASSED


if __name__ == "__main__":
    sys.exit(main())
