"""The process that does one job: ``python -m dora_diffusion.jobs.worker runs/<id>``.

It calls the same functions as the command line, and leaves with the same exit codes.
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
from dora_diffusion.console.errors import reporting_errors
from dora_diffusion.devices import peak_memory
from dora_diffusion.jobs import records
from dora_diffusion.jobs.errors import DamagedFile
from dora_diffusion.jobs.processes import Lock
from dora_diffusion.jobs.queue import note_worker
from dora_diffusion.jobs.workspace import Workspace


class _Stopped(BaseException):
    """SIGTERM came while nothing was there to save."""


def main(argv: list[str] | None = None) -> int:
    """Do the job of a folder. Returns its exit code."""
    folder = Path((sys.argv[1:] if argv is None else argv)[0]).resolve()
    # The worker of an earlier attempt may still be leaving; one that two apps started does it all.
    lock = Lock(folder / ".lock")
    lock.take(wait=True)
    if (folder / records.RESULT).exists():
        return 0
    note_worker(folder, os.getpid())
    signal.signal(signal.SIGTERM, _raise_stopped)
    threading.Thread(target=_watch_for_stop, args=(folder / records.STOP,), daemon=True).start()
    started = time.time()
    code = _run(folder)
    memory, gpu_memory = _peaks()
    records.write_result(folder, records.JobResult(code, started, time.time(), memory, gpu_memory))
    return code


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _watch_for_stop(file: Path) -> None:
    """Turn a STOP file into a SIGTERM, which the trainer answers by saving and leaving.

    The signal is Python's own: one that is sent through Windows ends a process at once.
    """
    while not file.exists():
        time.sleep(0.5)
    _thread.interrupt_main(signal.SIGTERM)


def _run(folder: Path) -> int:
    try:
        record = records.read_record(folder)
    except DamagedFile as error:
        print(f"error: {error}")
        return 1
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {record.title} ---", flush=True)
    try:
        note = records.ProgressFile(folder)
        note(phase="waiting for the device")
        with reporting_errors(record.request.kind, debug=False) as outcome:
            device = Lock(Workspace(folder.parent).device_lock)
            device.take(wait=True)
            outcome.code = _work(folder, record, note)
        return outcome.code
    except _Stopped:
        print("stopped before there was anything to save")
        return records.STOPPED_CODE
    except Exception:
        traceback.print_exc()
        return 1


def _work(folder: Path, record: records.JobRecord, note: records.ProgressFile) -> int:
    """Do what was asked for, with imports that wait for the device too. Returns the exit code."""
    workspace = Workspace(folder.parent)
    match record.request:
        case records.TrainRequest():
            from dora_diffusion.jobs.train import run_training

            return run_training(folder, record.resume, note)
        case records.MergeRequest() as request:
            from dora_diffusion.jobs.merge import run_merge

            run_merge(request, note)
        case records.CompareRequest() as request:
            from dora_diffusion.jobs.compare import run_comparison

            run_comparison(workspace, request, note)
        case records.PushRequest() as request:
            from dora_diffusion.jobs.push import run_push

            run_push(workspace, request, note)
        case records.AnalyzeRequest() as request:
            from dora_diffusion.jobs.analyze import run_analysis

            run_analysis(workspace, request, note)
    return 0


def _peaks() -> tuple[float, float | None]:
    """Most memory that was in use, in GiB, and on a GPU: the next run's estimate is from them."""
    memory = system.peak_memory()
    gpu_memory = None
    with contextlib.suppress(Exception):
        gpu_memory = peak_memory()
    return memory, None if gpu_memory is None else gpu_memory / 2**30


if __name__ == "__main__":
    # By its name: warnings that are put down to a module called __main__ are not this package's.
    from dora_diffusion.jobs import worker

    sys.exit(worker.main())
