"""Exit code of a command, and a one-line message for an error."""

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
from dora_diffusion.config.foreign import ForeignFileError
from dora_diffusion.system import is_windows

FAILED, OUT_OF_MEMORY = 1, 3
UNREAD = 128 + 13
"""Exit code if the reader of the output has closed it, as ``head`` does: that of SIGPIPE."""
_LONGEST_PATH = 260
# Advice for using less memory, by command.
_MEMORY_ADVICE = {
    "train": "lower --resolution, --train_batch_size or --rank, or use --gradient_checkpointing "
    "and --mixed_precision bf16",
    "generate": "lower --batch_size, --width and --height, or use --dtype float16",
}
# Maximum length of a defect's message: a library's may be pages long.
_LONG = 300
# Messages of torch's allocators that raise a plain RuntimeError: CPU on Linux and Windows, MPS.
_OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "std::bad_alloc", "backend out of memory",
)  # fmt: skip


@dataclass
class Outcome:
    """Exit code of the block."""

    code: int = 0


@contextmanager
def reporting_errors(command: str = "", *, debug: bool) -> Iterator[Outcome]:
    """Convert errors to an exit code and a last line on stderr, and warnings to lines.

    Errors that a user can fix (`ValueError`, `OSError` and their subclasses) are one line, except
    for the settings of another trainer's file. Other
    errors are defects: their line comes below the traceback and asks for a report.

    Args:
        command: The running command, for advice.
        debug: Raise all errors unchanged, as does ``DORA_DIFFUSION_DEBUG=1``.
    """
    outcome, is_done = Outcome(), False
    debug = debug or os.environ.get("DORA_DIFFUSION_DEBUG") == "1"
    with warnings.catch_warnings():
        _show_plain_warnings()
        try:
            yield outcome
            is_done = True
            if sys.stdout is not None:  # It is None without a console on Windows.
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
    """Return whether the output's reader has closed it; if so, discard the remaining output."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # No file, or no poll.
        output, poll = sys.stdout.fileno(), select.poll()
        poll.register(output, 0)
        if poll.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
            return True
    return False


def explain(error: Exception, command: str = "") -> tuple[int, str | None]:
    """Return the exit code of an error and its message; None for a defect of the program."""
    if is_out_of_memory(error):
        advice = _MEMORY_ADVICE.get(command, "close other programs, or use a larger machine")
        return OUT_OF_MEMORY, f"out of memory; {advice}"
    if isinstance(error, OSError) and is_windows() and len(str(error.filename)) >= _LONGEST_PATH:
        return FAILED, (
            f"{error.filename} has more than the {_LONGEST_PATH} characters that Windows allows a "
            "path; choose a folder with a shorter path, or turn LongPathsEnabled on"
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        return FAILED, f"{error.filename} does not exist"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return FAILED, f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return FAILED, _one_line(error.strerror)
    if isinstance(error, ImportError) and not (error.name or "").startswith("dora_diffusion"):
        return FAILED, (
            f"{_one_line(str(error))}; a package is missing or does not fit the others: run "
            "`dora-diffusion doctor` to find it, and install it again"
        )
    if isinstance(error, ForeignFileError):
        return FAILED, _answers(error)
    known = isinstance(error, (ValueError, OSError)) or type(error).__name__ == "TrainingError"
    return FAILED, _one_line(str(error)) if known and str(error) else None


def _answers(error: ForeignFileError) -> str:
    """Return the settings of another trainer's file, as lines of YAML to copy."""
    from dora_diffusion.config.answers import ForeignAnswers

    return (
        f"{error.path} is {error.title}. Copy these lines into a YAML file, and give that as "
        f"--config:\n{ForeignAnswers(error.file).text}"
    )


def explain_to_all(error: Exception, command: str = "") -> str:
    """Return the message of an error for a page, which other people than the app's owner may read.

    For a defect it contains only the class of the error. The traceback is in the server's log.
    """
    line = explain(error, command)[1]
    return line or asking_for_report(type(error).__name__, " in the server's log")


def asking_for_report(error: Exception | str, location: str = "") -> str:
    """Return the last line of a defect's output, which asks for a report.

    Args:
        error: The exception, or a text about it.
        location: Location of the traceback, if it is not above this line.
    """
    if isinstance(error, Exception):
        error = traceback.format_exception_only(error)[-1]
    text = _one_line(error)
    if len(text) > _LONG:
        text = f"{text[:_LONG].rstrip()} ..."
    return (
        f"unexpected {text}; this is a bug: please report it with the traceback{location} and the "
        "output of `dora-diffusion doctor`"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(t in str(error) for t in _OUT_OF_MEMORY)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show_plain_warnings() -> None:
    """Print each of this package's warnings once, as a line, and ignore warnings of libraries."""
    warnings.simplefilter("ignore")
    if os.environ.get("RANK", "0") != "0":
        return  # Only the first of several processes prints warnings.
    warnings.filterwarnings("always", category=UserWarning, module=r"dora_diffusion\.")

    printed = set[str]()

    def show(message: Any, *_: Any, **__: Any) -> None:
        line = f"warning: {_one_line(str(message))}"
        if line not in printed:
            printed.add(line)
            say(line, sys.stderr)

    warnings.showwarning = show
