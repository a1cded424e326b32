"""Worker process of one job: ``python -m dora_diffusion.studio.worker runs/<id>``.

It runs the job's command as a terminal would, but writes progress to the job's file.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

from dora_diffusion import system
from dora_diffusion.cli.console.output import telling
from dora_diffusion.cli.main import main as main_of_command
from dora_diffusion.numerics.devices import peak_memory
from dora_diffusion.studio.jobs import records
from dora_diffusion.studio.jobs.queue import Lock, note_worker
from dora_diffusion.studio.jobs.store import DamagedFile, Workspace


class _Stopped(BaseException):
    """SIGTERM arrived before there was anything to save."""


def main(argv: list[str] | None = None) -> int:
    """Run the job of a folder. Returns its exit code."""
    folder = Path((sys.argv[1:] if argv is None else argv)[0]).resolve()
    # The worker of an earlier attempt may still be exiting; two apps may start two workers.
    lock = Lock(folder / ".lock")
    lock.take(wait=True)
    if (folder / records.RESULT).exists():
        return 0
    note_worker(folder, os.getpid())
    started, code = time.time(), records.STOPPED_CODE
    # A stop may come before there is anything to save, or after everything is done.
    with contextlib.suppress(_Stopped):
        signal.signal(signal.SIGTERM, _raise_stopped)
        threading.Thread(target=_watch_for_stop, args=(folder / records.STOP,), daemon=True).start()
        code = _run(folder)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # The result is written next.
    memory, gpu_memory = _peaks()
    records.write_result(folder, records.JobResult(code, started, time.time(), memory, gpu_memory))
    return code


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _watch_for_stop(file: Path) -> None:
    """Convert a STOP file to a SIGTERM, on which the trainer saves and exits.

    Python simulates the signal: one sent through Windows would kill the process.
    """
    while not file.exists():
        time.sleep(0.5)
    _thread.interrupt_main(signal.SIGTERM)


def _run(folder: Path) -> int:
    """Run the job's command when the device is free. Returns its exit code."""
    try:
        record = records.read_record(folder)
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {record.title} ---", flush=True)
        progress = records.ProgressFile(folder)
        progress(phase="waiting for the device")
        device = Lock(Workspace(folder.parent).device_lock)
        device.take(wait=True)
        progress(phase="starting")
        with telling(progress):
            return main_of_command(record.arguments)
    except (DamagedFile, OSError) as error:
        print(f"error: {error}")
        return 1
    except _Stopped:
        print("stopped before there was anything to save")
        return records.STOPPED_CODE
    except SystemExit as error:  # a mistake in the arguments
        return error.code if isinstance(error.code, int) else 1
    except Exception:
        traceback.print_exc()
        return 1


def _peaks() -> tuple[float, float | None]:
    """Return the peak memory and the GPU's, in GiB, from which later runs are estimated."""
    memory = system.peak_memory()
    gpu_memory = None
    with contextlib.suppress(Exception):
        gpu_memory = peak_memory()
    return memory, None if gpu_memory is None else gpu_memory / 2**30


if __name__ == "__main__":
    # Import by name: warnings from a module called __main__ do not count as this package's.
    from dora_diffusion.studio import worker

    sys.exit(worker.main())
