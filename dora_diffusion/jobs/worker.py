"""The process that does one job: ``python -m dora_diffusion.jobs.worker runs/<id>``.

It calls the same functions as the command line, and leaves with the same exit codes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from dora_diffusion.console.errors import reporting_errors
from dora_diffusion.jobs.processes import Lock, process_start
from dora_diffusion.jobs.queue import JOB, PROGRESS, RESULT, SETTINGS, STOP, WORKER
from dora_diffusion.jobs.workspace import AppError, Workspace, read_json, write_json

if TYPE_CHECKING:
    from dora_diffusion.jobs.snapshot import Job

_STOPPED = 128 + signal.SIGTERM


class _Stopped(BaseException):
    """SIGTERM came while nothing was there to save."""


def main(argv: list[str] | None = None) -> int:
    """Do the job of a folder. Returns its exit code."""
    folder = Path((sys.argv[1:] if argv is None else argv)[0]).resolve()
    # The worker of an earlier attempt may still be leaving; one that two apps started does it all.
    mine = Lock(folder / ".lock")
    mine.take(wait=True)
    if (folder / RESULT).exists():
        return 0
    write_json(folder / WORKER, {"pid": os.getpid(), "start": process_start(os.getpid())})
    signal.signal(signal.SIGTERM, _raise_stopped)
    threading.Thread(target=_watch_for_stop, args=(folder / STOP,), daemon=True).start()
    started = time.time()
    code = _run(folder)
    result = {"code": code, "started": started, "finished": time.time(), **_peaks()}
    write_json(folder / RESULT, result)
    return code


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _watch_for_stop(file: Path) -> None:
    """Turn a STOP file into a SIGTERM, which the trainer answers by saving and leaving."""
    while not file.exists():
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _run(folder: Path) -> int:
    job = read_json(folder / JOB)
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {job.get('title', '')} ---", flush=True)
    try:
        note = _Progress(folder / PROGRESS)
        note(phase="waiting for the device")
        with reporting_errors(job["kind"], debug=False) as outcome:
            device = Lock(Workspace(folder.parent).device_lock)
            device.take(wait=True)
            work = {"train": _train, "merge": _merge, "compare": _compare, "push": _push}
            outcome.code = work[job["kind"]](folder, job, note)
        return outcome.code
    except _Stopped:
        print("stopped before there was anything to save")
        return _STOPPED
    except Exception:
        import traceback

        traceback.print_exc()
        return 1


class _Progress:
    """Keeps progress.json: what the page cannot read from the trainer's own files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._facts: dict[str, Any] = {}
        self._written = 0.0

    def __call__(self, *, often: bool = False, **facts: Any) -> None:
        """Note facts; those that change often are written twice a second at most."""
        self._facts |= facts
        now = time.monotonic()
        if not often or now - self._written > 0.5:
            write_json(self._path, self._facts)
            self._written = now


def _train(folder: Path, job: dict[str, Any], note: _Progress) -> int:
    """What ``dora-diffusion train --config settings.yaml`` does."""
    import dataclasses

    from dora_diffusion.config import TrainConfig, read_config_file
    from dora_diffusion.console.training import TrainProgress
    from dora_diffusion.memory import describe_device

    note(phase="loading the model", device_name=describe_device().name)
    from dora_diffusion.training.checkpoint import checkpoints_in
    from dora_diffusion.training.events import Event, StepDone, TrainingStarted
    from dora_diffusion.training.loop import train

    config = TrainConfig.from_dict(read_config_file(folder / SETTINGS))
    if job.get("resume"):
        # Without a checkpoint there is nothing to go on from, and nothing to lose.
        again: dict[str, Any] = (
            {"resume_from_checkpoint": "latest"}
            if checkpoints_in(Path(config.output_dir))
            else {"overwrite_output_dir": True}
        )
        config = dataclasses.replace(config, **again)
    show = TrainProgress()

    def on_event(event: Event) -> None:
        show(event)
        if isinstance(event, TrainingStarted):
            facts = dataclasses.asdict(event)
            note(phase="training", first_step=facts.pop("step"), **facts)
        elif isinstance(event, StepDone) and event.step == event.total_steps:
            note(phase="saving and sampling")

    result = train(config, on_event)
    return _STOPPED if result.interrupted else 0


def _merge(folder: Path, job: dict[str, Any], note: _Progress) -> int:
    """What ``dora-diffusion export`` does."""
    from dora_diffusion.export import export_checkpoint
    from dora_diffusion.jobs.loading import ModelFiles

    note(phase="merging")
    names = ("vae", "config", "variant", "revision")
    files = ModelFiles(**{name: job.get(name) for name in names})

    def show(done: int, total: int) -> None:
        note(often=done < total, phase="merging", done=done, total=total)

    output = Path(job["output"])
    output.parent.mkdir(parents=True, exist_ok=True)
    export_checkpoint(
        files.base(job["base"]),
        job["adapter"],
        output,
        strength=job["strength"],
        vae=files.vae,
        variant=files.variant,
        config=files.config,
        overwrite=True,
        on_progress=show,
    )
    print(f"{output} (reopened and checked)")
    return 0


def _compare(folder: Path, job: dict[str, Any], note: _Progress) -> int:
    """Ask every checkpoint of a run for the same images, and measure them."""
    from dora_diffusion.jobs.chooser import comparison_folder
    from dora_diffusion.jobs.comparison import compare, questions_about
    from dora_diffusion.jobs.loading import ModelFiles
    from dora_diffusion.jobs.snapshot import adapter_of

    note(phase="loading the model")
    run = _run_of(folder, job)
    found = {name: adapter_of(run, name) for name in job["checkpoints"]}
    adapters = {name: path for name, path in found.items() if path is not None}

    def show(done: int, total: int) -> None:
        note(often=done < total, phase="generating images", done=done, total=total)

    target = comparison_folder(Workspace(folder.parent), run.id)
    files = ModelFiles.of(run.settings)
    compare(job["base"], adapters, questions_about(run), target, show, files)
    return 0


def _push(folder: Path, job: dict[str, Any], note: _Progress) -> int:
    """What ``dora-diffusion push`` does."""
    from dora_diffusion.hub import push
    from dora_diffusion.jobs.exports import card_of, chosen_adapter

    run = _run_of(folder, job)
    note(phase="uploading")
    address = push(
        run.folder,
        job["repository"],
        private=job["private"],
        adapter=chosen_adapter(run),
        card=card_of(run),
    )
    note(phase="uploaded", address=address, done=1, total=1)
    print(address)
    return 0


def _run_of(folder: Path, job: dict[str, Any]) -> Job:
    """The training run that a job is about."""
    from dora_diffusion.jobs.snapshot import read_job

    run = read_job(Workspace(folder.parent).job(job["run"]))
    if run is None:
        raise AppError("the run that this was about was deleted")
    return run


def _peaks() -> dict[str, float]:
    """Most memory that was in use, in GiB: what the next run's estimate is made from."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    torch = sys.modules.get("torch")
    with contextlib.suppress(Exception):
        if torch is not None and torch.cuda.is_available():
            peaks["peak_gpu_memory"] = torch.cuda.max_memory_allocated() / 2**30
    return peaks


if __name__ == "__main__":
    # By its name: warnings that are put down to a module called __main__ are not this package's.
    from dora_diffusion.jobs import worker

    sys.exit(worker.main())
