"""Says how many blocks of the documents ran."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    passed = terminalreporter.stats.get("passed", [])
    ran = [value for report in passed for name, value in report.user_properties if name == "blocks"]
    if ran:
        terminalreporter.write_line(f"executed {sum(ran)} blocks of {len(ran)} documents")
