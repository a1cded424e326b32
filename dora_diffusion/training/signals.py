"""Signal handling: the first signal saves a checkpoint and stops, the third one ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from dora_diffusion.system import HANGUP, INTERRUPTS, STOP_SIGNALS


class Stopped(BaseException):
    """Signal with nothing to save. Not an `Exception`, so that libraries do not catch it."""


class StopRequest:
    """Context in which signals set `requested` instead of ending the process.

    The first signal prints the line set by `answer_with`, or raises `Stopped` if there is nothing
    to save. A second SIGINT (Ctrl-C), SIGBREAK (Ctrl-Break on Windows) or SIGTERM only prints a
    warning, since keys may be pressed twice and two programs may end the same process. A third one
    ends the process. Further SIGHUPs (closed terminal) are ignored, since terminal and shell send
    one each. If SIGHUP was ignored when the process started (``nohup``), it remains ignored.

    Python sets signal handlers in the main thread only. In other threads the context does nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._answer: str | None = None
        self._interrupts = 0
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    @property
    def requested(self) -> bool:
        """True if a signal was received."""
        return self.signal_number is not None

    def answer_with(self, text: str | None) -> None:
        """Set the line that the first signal prints; None: the signal raises `Stopped`."""
        self._answer = text

    def __enter__(self) -> StopRequest:
        """Install the signal handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # A data loader's worker, which ends with its parent.
        if number == HANGUP:
            self._leave_closed_terminal()
            signal.signal(number, signal.SIG_IGN)
        else:
            self._interrupts += 1
        if self.signal_number is None:
            self.signal_number = number
        if self._answer is None:
            _say("stopping: nothing has been trained yet")
            raise Stopped
        if self._interrupts < 2:
            _say(self._answer)
            return
        self._let_the_next_end()
        _say(f"still {self._answer}; press Ctrl-C once more to leave without that")

    def _leave_closed_terminal(self) -> None:
        """Discard output to a closed terminal, where each write would raise an error."""
        for descriptor in self._terminals:
            if not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)

    def _let_the_next_end(self) -> None:
        """Restore the previous handlers. Ignored signals (background jobs) get the default one."""
        default: dict[int, Any] = dict.fromkeys(INTERRUPTS, signal.default_int_handler)
        for number in set(self._previous) - {HANGUP}:
            before = self._previous[number]
            ignored = before == signal.SIG_IGN
            signal.signal(number, default.get(number, signal.SIG_DFL) if ignored else before)

    def __exit__(self, *error: object) -> None:
        """Restore the previous signal handlers."""
        for number, before in self._previous.items():
            signal.signal(number, before)


def _say(text: str) -> None:
    """Print from a signal handler, which may have interrupted another print.

    The text begins with a line break, since a progress bar usually occupies the current line.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # Only the first process prints.
    with contextlib.suppress(OSError, ValueError):
        try:
            print(f"\n{text}", file=sys.stderr, flush=True)
        except RuntimeError:
            os.write(2, f"\n{text}\n".encode())
