"""How a command ends: its exit code, and one plain line for what went wrong."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dora_diffusion.console.progress import say

FAILED, OUT_OF_MEMORY = 1, 3
# What uses less memory, by command.
_MEMORY_ADVICE = {
    "train": "lower --resolution, --train_batch_size or --rank, or use --gradient_checkpointing "
    "and --mixed_precision bf16",
    "generate": "lower --batch_size, --width and --height, or use --dtype float16",
}
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
    """Turn errors into an exit code and a last line on stderr, and warnings into lines.

    Errors that a user can act on (`ValueError`, `OSError` and what derives from them) are one
    line. Others are defects, and keep their traceback.

    Args:
        command: The command that runs, for advice.
        debug: Let every error through with its traceback; ``DORA_DIFFUSION_DEBUG=1`` does too.
    """
    outcome = Outcome()
    debug = debug or os.environ.get("DORA_DIFFUSION_DEBUG") == "1"
    with warnings.catch_warnings():
        _show_plain_warnings()
        try:
            yield outcome
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            outcome.code = 130
        except Exception as error:
            code, line = explain(error, command)
            if debug or line is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            outcome.code = code


def explain(error: Exception, command: str = "") -> tuple[int, str | None]:
    """Exit code of an error and its one line; None for a defect of the program."""
    if is_out_of_memory(error):
        advice = _MEMORY_ADVICE.get(command, "close other programs, or use a larger machine")
        return OUT_OF_MEMORY, f"out of memory; {advice}"
    if isinstance(error, FileNotFoundError) and error.filename:
        return FAILED, f"{error.filename} does not exist"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return FAILED, f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return FAILED, _one_line(error.strerror)
    known = isinstance(error, (ValueError, OSError)) or type(error).__name__ == "TrainingError"
    return FAILED, _one_line(str(error)) if known and str(error) else None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(t in str(error) for t in _OUT_OF_MEMORY)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show_plain_warnings() -> None:
    """Show this package's warnings as lines; leave the libraries' to themselves."""
    warnings.simplefilter("ignore")
    if os.environ.get("RANK", "0") != "0":
        return  # Of several processes, the first one speaks.
    warnings.filterwarnings("always", category=UserWarning, module=r"dora_diffusion\.")

    def show(message: Any, *_: Any, **__: Any) -> None:
        say(f"warning: {_one_line(str(message))}", sys.stderr)

    warnings.showwarning = show
