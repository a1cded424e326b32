"""Output of a job's process, followed while it grows: its metrics and its log."""

from __future__ import annotations

import functools
import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dora_diffusion.cli.console.errors import asking_for_report
from dora_diffusion.studio.jobs.records import LOG
from dora_diffusion.studio.jobs.workspace import DamagedFile

_LOG_BYTES = 60_000
_WARNINGS_BYTES = 4_000_000
# The line that a worker begins each attempt with.
_NEW_ATTEMPT = "\n--- "
_METRICS_NAME = "metrics.jsonl"


def read_metrics(folder: Path) -> tuple[dict[str, Any], ...]:
    """The steps' records that are whole. Of a file that has grown, only what is new is read."""
    return tuple(record for record in _records(folder) if "loss" in record)


def read_validation(folder: Path) -> dict[int, float]:
    """The validation losses of a run by step; the base's is that of step 0."""
    name = "validation_loss"
    return {record["step"]: record[name] for record in _records(folder) if record.get(name)}


def _records(folder: Path) -> tuple[dict[str, Any], ...]:
    try:
        return _follow(folder / _METRICS_NAME).records
    except OSError:
        return ()


def check_metrics(folder: Path) -> None:
    """Check that every line of a run's metrics can be read; the last one may be half-written.

    Raises:
        DamagedFile: If one cannot, or the file.
    """
    path = folder / _METRICS_NAME
    try:
        damaged = _follow(path).damaged
    except FileNotFoundError:
        return
    except OSError as error:
        raise DamagedFile(path, error.strerror) from error
    if damaged:
        raise DamagedFile(path, f"line {damaged} is not a record of a step, and is skipped")


def _follow(path: Path) -> _MetricsFile:
    with _METRICS_LOCK, path.open("rb") as file:
        known = _METRICS.pop(path, None) or _MetricsFile()
        _METRICS[path] = known.follow(file)
        while len(_METRICS) > _MOST_METRICS:
            del _METRICS[next(iter(_METRICS))]
        return _METRICS[path]


@dataclass(frozen=True)
class _MetricsFile:
    """Records of a file up to ``end``, and its line that ends there.

    ``lines`` counts those that are read, and ``damaged`` is the first one that is not a record.
    """

    records: tuple[dict[str, Any], ...] = ()
    end: int = 0
    last: bytes = b""
    lines: int = 0
    damaged: int = 0

    def follow(self, file: IO[bytes]) -> _MetricsFile:
        """Return these records and the added ones; all are reread if a resumed run cut the file."""
        file.seek(self.end - len(self.last))
        if file.read(len(self.last)) != self.last:
            file.seek(0)
            return _MetricsFile().follow(file)
        records, end, last = [], self.end, self.last
        lines, damaged = self.lines, self.damaged
        for line in file:
            if not line.endswith(b"\n"):
                break  # half written
            end, last, lines = end + len(line), line, lines + 1
            record = _whole_record(line)
            if record is not None:
                records.append(record)
            else:
                damaged = damaged or lines
        if end == self.end:
            return self
        return _MetricsFile((*self.records, *records), end, last, lines, damaged)


def _whole_record(line: bytes) -> dict[str, Any] | None:
    """A step's record with the numbers that the page shows; None for anything else.

    Those of held-out photos have others, which are missing where they were not finite.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    if any(name.startswith("validation_") for name in record):
        return record
    numbers = (record.get("loss"), record.get("seconds"))
    is_whole = all(type(n) in (int, float) and math.isfinite(n) for n in numbers)  # type: ignore[arg-type]
    return record if is_whole else None


_METRICS: dict[Path, _MetricsFile] = {}
_METRICS_LOCK = threading.Lock()
_MOST_METRICS = 64


def log_tail(folder: Path, lines: int = 40) -> str:
    """The last lines of a job's log; of a progress bar, its latest state."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    # A bar returns to the start of its line: what was there before is overwritten.
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join([line for line in shown if line.strip()][-lines:])


def log_warnings(folder: Path) -> tuple[str, ...]:
    """Return the warnings of a job's latest attempt, each once."""
    try:
        status = (folder / LOG).stat()
        return _warnings(folder / LOG, status.st_mtime_ns, status.st_size)
    except OSError:
        return ()


@functools.lru_cache(maxsize=128)
def _warnings(log: Path, modified: int, size: int) -> tuple[str, ...]:
    with log.open("rb") as file:
        text = file.read(_WARNINGS_BYTES).decode("utf-8", errors="replace")
    lines = text.rpartition(_NEW_ATTEMPT)[2].replace("\r", "\n").splitlines()
    warned = (line.removeprefix("warning: ") for line in lines if line.startswith("warning: "))
    return tuple(dict.fromkeys(warned))


def printed(folder: Path) -> list[str]:
    """Return the printed lines of a job's latest attempt, but for warnings."""
    # The first line is its heading.
    lines = f"\n{log_tail(folder, 100)}".rpartition(_NEW_ATTEMPT)[2].splitlines()[1:]
    return [line for line in lines if not line.startswith("warning: ")]


def last_error(folder: Path) -> str:
    """The cause that the log ends with: its last ``error:`` line, or a traceback's last line."""
    text = log_tail(folder, 400).rpartition(_NEW_ATTEMPT)[2]
    lines = text.splitlines()
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    if "Traceback (most recent call last)" in text and lines:
        return asking_for_report(lines[-1])
    return ""
