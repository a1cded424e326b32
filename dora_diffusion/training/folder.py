"""Times at which a run samples, validates, saves and ends; `RunFiles` does it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

from dora_diffusion.formats.files.runs import REQUESTS, SAMPLE
from dora_diffusion.training import events
from dora_diffusion.training.processes import SharedFlags
from dora_diffusion.training.results.files import RunFiles, TrainResult
from dora_diffusion.training.run import Run
from dora_diffusion.training.signals import StopRequest

__all__ = ["RunFolder", "TrainResult"]


class RunFolder:
    """Output folder of a run, called between the steps.

    Args:
        run: The run. It is restored from the checkpoint of ``resume_from_checkpoint``.
        on_event: Called with each event (`dora_diffusion.training.events`).
        stop: Signals that stop the run.

    Attributes:
        files: Files of the folder.
        steps: Number of completed steps.
        is_over: Whether the run has no further step, by its settings or by a signal.
    """

    def __init__(self, run: Run, on_event: events.OnEvent, stop: StopRequest) -> None:
        self.run, self.stop = run, stop
        self.files = RunFiles(run, on_event, stop)
        self.steps, self.is_over = self.files.start.step, False
        self._is_begun = False
        self._any_set = SharedFlags(run.accelerator)

    def begin(self) -> None:
        """Prepare the first step: fill the caches, open the log, and sample if configured."""
        run = self.run
        if run.components.offload_to is not None and run.total_steps > self.steps:
            from dora_diffusion.training.inputs.cache import cache_inputs

            cache_inputs(run, run.total_steps - self.steps, self.files.on_event)
        self.files.open()
        if self.steps == 0 and run.config.sample_at_start:
            self.files.sample(0)
        self._begun, self._data_position = time.perf_counter(), run.data_position()
        self._is_begun = True
        if self._validate():  # The starting weights may be the best ones.
            self.files.checkpoint(self.steps, is_best=True)
        self._answer_requests()

    def record(self, record: Mapping[str, Any]) -> None:
        """Log a completed step, and do what is due after it."""
        run, files = self.run, self.files
        self.steps, self._data_position = self.steps + 1, run.data_position()
        seconds = round(time.perf_counter() - self._begun, 4)
        self._begun = time.perf_counter()
        files.log.add({**record, "seconds": seconds})
        is_best = self._validate()
        every = run.config.validation_steps
        if every and self.steps % every == 0 and self.steps < run.total_steps:
            files.sample(self.steps)
        if files.saver.is_due(self.steps) or is_best:
            files.checkpoint(self.steps, is_best=is_best)
        self._answer_requests()

    def _validate(self) -> bool:
        """Compute the validation loss if due. Returns whether the step is the best to keep."""
        validation = self.run.validation
        if validation is None or not validation.is_due(self.steps):
            return False
        self.files.validate(self.steps, validation)
        return validation.keeps_best and validation.best() == self.steps

    def _answer_requests(self) -> None:
        """Take samples and checkpoints that a file or the clock asks for, and note a signal."""
        files = self.files
        asks = files.is_main and self.steps > files.start.step
        sampling, saving = (asks and self._asked(name) for name in REQUESTS)
        overdue = asks and files.saver.is_overdue()
        stopping, sampling, saving, overdue = self._any_set(
            self.stop.requested, sampling, saving, overdue
        )
        self.is_over = stopping or self.steps >= self.run.total_steps
        if self.is_over:
            return
        if sampling:
            files.sample(self.steps)
        if saving or overdue:
            files.checkpoint(self.steps, interim=not saving)

    def _asked(self, name: str) -> bool:
        """Return whether a request file exists in the folder, and remove it."""
        file = self.files.output_dir / name
        if not file.exists():
            return False
        file.unlink(missing_ok=True)
        if name == SAMPLE and not self.run.config.num_validation_images:
            warnings.warn(
                f"{SAMPLE} requests sample images, but num_validation_images is 0", stacklevel=3
            )
        return True

    def fail(self, error: Exception) -> None:
        """Save the completed steps, if possible, before an error ends the run."""
        if self._is_begun:
            self.files.fail(error, self.steps, self._data_position)

    def finish(self) -> TrainResult:
        """Save the last checkpoint; write the result, its samples and its model card.

        Raises:
            TrainingError: If no trained number has moved. The files are written.
        """
        files, is_complete = self.files, self.steps >= self.run.total_steps
        files.log.flush()
        if self.steps > files.start.step and (files.saver.every_steps or not is_complete):
            files.checkpoint(self.steps)
        return files.finish(self.steps, is_complete=is_complete)
