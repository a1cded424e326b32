"""End of a command: its exit code, and one plain line for what went wrong."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dora_diffusion.cli.console.output import say
from dora_diffusion.system import is_windows

FAILED, OUT_OF_MEMORY = 1, 3
UNREAD = 128 + 13
"""Exit code of a command that its output's reader has left, as ``head`` does: of SIGPIPE."""
_LONGEST_PATH = 260
# What uses less memory, by command.
_MEMORY_ADVICE = {
    "train": "lower --resolution, --train_batch_size or --rank, or use --gradient_checkpointing "
    "and --mixed_precision bf16",
    "generate": "lower --batch_size, --width and --height, or use --dtype float16",
}
# Of a defect's message, which may be that of a library, and pages long.
_LONG = 300
# How torch's allocators say it that have no class of their own: a CPU's on Linux and on Windows,
# and Apple's GPU's.
_OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "std::bad_alloc", "backend out of memory",
)  # fmt: skip


@dataclass
class Outcome:
    """The exit code of the block."""

    code: int = 0


@contextmanager
def reporting_errors(command: str = "", *, debug: bool) -> Iterator[Outcome]:
    """Convert errors to an exit code and a last line on stderr, and warnings to lines.

    Errors that a user can act on (`ValueError`, `OSError` and what derives from them) are one
    line. Others are defects: that line comes below their traceback, and asks for a report.

    Args:
        command: The command that runs, for advice.
        debug: Let every error through as it is; ``DORA_DIFFUSION_DEBUG=1`` does too.
    """
    outcome, is_done = Outcome(), False
    debug = debug or os.environ.get("DORA_DIFFUSION_DEBUG") == "1"
    with warnings.catch_warnings():
        _show_plain_warnings()
        try:
            yield outcome
            is_done = True
            if sys.stdout is not None:  # as without a console on Windows
                sys.stdout.flush()
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            outcome.code = 130
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _is_unread():
                outcome.code = outcome.code if is_done else UNREAD
                return
            code, line = explain(error, command)
            if debug:
                raise
            if line is None:
                traceback.print_exception(error)
                line = asking_for_report(error)
            print(f"error: {line}", file=sys.stderr)
            outcome.code = code


def _is_unread() -> bool:
    """Return whether nobody reads the output any more; what is left of it goes nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file, or no poll
        output, poll = sys.stdout.fileno(), select.poll()
        poll.register(output, 0)
        if poll.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
            return True
    return False


def explain(error: Exception, command: str = "") -> tuple[int, str | None]:
    """Exit code of an error and its one line; None for a defect of the program."""
    if is_out_of_memory(error):
        advice = _MEMORY_ADVICE.get(command, "close other programs, or use a larger machine")
        return OUT_OF_MEMORY, f"out of memory; {advice}"
    if isinstance(error, OSError) and is_windows() and len(str(error.filename)) >= _LONGEST_PATH:
        return FAILED, (
            f"{error.filename} has more than the {_LONGEST_PATH} characters that Windows allows a "
            "path; choose a folder nearer to the drive, or turn LongPathsEnabled on"
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        return FAILED, f"{error.filename} does not exist"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return FAILED, f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return FAILED, _one_line(error.strerror)
    if isinstance(error, ImportError) and not (error.name or "").startswith("dora_diffusion"):
        return FAILED, (
            f"{_one_line(str(error))}; a package is missing or does not fit the others: "
            "`dora-diffusion doctor` says which, and installing again repairs it"
        )
    known = isinstance(error, (ValueError, OSError)) or type(error).__name__ == "TrainingError"
    return FAILED, _one_line(str(error)) if known and str(error) else None


def explain_to_all(error: Exception, command: str = "") -> str:
    """One line for a page, whose users need not be who runs the app: of a defect, its kind alone.

    Its traceback is for the server's log.
    """
    line = explain(error, command)[1]
    return line or asking_for_report(type(error).__name__, " in the server's log")


def asking_for_report(error: Exception | str, place: str = "") -> str:
    """The line that a defect ends with.

    Args:
        error: The exception, or what is to be told of it.
        place: Where its traceback is, where that is not above this line.
    """
    if isinstance(error, Exception):
        error = traceback.format_exception_only(error)[-1]
    text = _one_line(error)
    if len(text) > _LONG:
        text = f"{text[:_LONG].rstrip()} ..."
    return (
        f"unexpected {text}; this is a bug: please report it, with the traceback{place} and with "
        'what `dora-diffusion doctor` prints (in the app: "For a bug report")'
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(t in str(error) for t in _OUT_OF_MEMORY)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show_plain_warnings() -> None:
    """Show each of this package's warnings as a line, once; leave the libraries' to themselves."""
    warnings.simplefilter("ignore")
    if os.environ.get("RANK", "0") != "0":
        return  # Of several processes, the first one speaks.
    warnings.filterwarnings("always", category=UserWarning, module=r"dora_diffusion\.")

    shown = set[str]()

    def show(message: Any, *_: Any, **__: Any) -> None:
        line = f"warning: {_one_line(str(message))}"
        if line not in shown:
            shown.add(line)
            say(line, sys.stderr)

    warnings.showwarning = show
