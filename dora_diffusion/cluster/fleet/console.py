"""Display of a fleet: a table on a terminal, or a line for each subject in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from dora_diffusion.cli.console.output import say, tell
from dora_diffusion.cluster.fleet.results import FAILED, SubjectRecord
from dora_diffusion.cluster.fleet.run import Fleet
from dora_diffusion.config.wording import counted, duration

# Most rows of running subjects.
_ROWS = 20
_REDRAW_SECONDS = 0.5


class FleetTable:
    """Table of a fleet's progress.

    Args:
        is_terminal: True if lines can be overwritten. Default: True if standard error is a
            terminal.
        clock: Returns a time in seconds.
    """

    def __init__(
        self, is_terminal: bool | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._clock = clock
        self._drawn = self._lost = 0
        self._last = -_REDRAW_SECONDS
        self._warned: set[str] = set()

    def __call__(self, fleet: Fleet, ended: SubjectRecord | None) -> None:
        """Display the fleet, and a subject that has just ended."""
        lost = fleet.queue.lost[self._lost :]
        if ended is not None or lost:
            self.close()
        for report in lost:
            say(f"lost: {report.task.name}: {report.lost}; it is resumed", sys.stderr)
        self._lost += len(lost)
        if ended is not None:
            self._say_end(fleet, ended)
        total = len(fleet.records) + sum(fleet.queue.sizes)
        tell(phase="training subjects", unit="subject", done=len(fleet.records), total=total)
        if self._is_terminal and (ended or self._clock() - self._last >= _REDRAW_SECONDS):
            self.close()
            lines = table_lines(fleet)
            sys.stderr.write("\n".join(lines) + "\n")
            sys.stderr.flush()
            self._drawn, self._last = len(lines), self._clock()

    def close(self) -> None:
        """Clear the table."""
        if self._drawn:
            sys.stderr.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

    def _say_end(self, fleet: Fleet, record: SubjectRecord) -> None:
        for text in set(record.warnings) - self._warned:  # Most are about common settings.
            self._warned.add(text)
            name = f"{record.name}: " if record.pack == 1 else ""  # A pack shares its warnings.
            say(f"warning: {name}{text}", sys.stderr)
        if record.status == FAILED:
            say(f"failed: {record.name}: {record.cause}", sys.stderr)
        elif record.name not in fleet.known:
            again = f", {counted(record.attempts, 'worker')}" if record.attempts > 1 else ""
            took = duration(record.seconds)
            say(f"done: {record.name} in {took}{again} ({record.worker})", sys.stderr)


def table_lines(fleet: Fleet) -> list[str]:
    """Return the counts, and a row for each running subject with step, loss and worker."""
    queue, failed = fleet.queue, len(fleet.failed)
    running, waiting = queue.sizes
    counts = [
        f"{len(fleet.records) - failed} done" + (
            f" ({len(fleet.known)} before)" if fleet.known else ""
        ),
        f"{running} running",
        f"{waiting} waiting",
        f"{failed} failed",
    ]  # fmt: skip
    if queue.per_hour is not None:
        counts += [f"{queue.per_hour:.0f} an hour", f"{duration(queue.seconds_left)} left"]
    lines, steps = [", ".join(counts)], fleet.workers.progress()
    for name, task in list(queue.running.items())[:_ROWS]:
        text, step = "starting", steps.get(name)
        if step is not None:
            text = f"step {step.step} of {step.total_steps}, loss {step.loss:.4f}"
        lines.append(f"  {name}: {text} ({task.location.worker})")
    if len(queue.running) > _ROWS:
        lines.append(f"  and {len(queue.running) - _ROWS} more")
    return lines
