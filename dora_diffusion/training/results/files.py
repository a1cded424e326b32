"""Files of a run's output folder: log, checkpoints, samples and result."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.data.photos import write_photo_record
from dora_diffusion.training import events
from dora_diffusion.training.features.outside import copied
from dora_diffusion.training.metrics import (
    MOST_SKIPPED,
    MetricsLog,
    Trackers,
    TrainingError,
    is_validation,
    naming_step,
    tracked_settings,
)
from dora_diffusion.training.processes import set_by_any, shards_model
from dora_diffusion.training.results.checkpoint import (
    CheckpointSaver,
    checkpoints_in,
    hook_states,
    state_of,
    step_of,
)
from dora_diffusion.training.results.folders import FEATURES, METRICS_NAME, clear_folder
from dora_diffusion.training.results.record import save_record
from dora_diffusion.training.results.resume import save_config, start_run
from dora_diffusion.training.results.write import (
    SampleWriter,
    result_metadata,
    take_best,
    warning_of_full_disk,
    write_result,
)
from dora_diffusion.training.run import Run
from dora_diffusion.training.signals import StopRequest

if TYPE_CHECKING:
    from dora_diffusion.training.features.validation import Validation

SAVING = "stopping after this step, and saving a checkpoint"
_FINISHING = "stopping: the result is being written, its sample images are left out"


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        output_dir: Output folder of the run.
        adapter: Adapter file; None if the run was interrupted or trained no adapter.
        steps: Number of completed optimizer steps.
        total_steps: Number of optimizer steps of the whole run; 0 if it was interrupted before that
            was known.
        signal_number: Signal that interrupted the run, or None.
        samples: Name -> image file, with names such as ``adapted`` and ``base``.
        checkpoint: Newest checkpoint to resume from, or None.
        model: Folder of the fine-tuned model; None if adapters were trained.
        result_step: Step whose weights the result has, which may be earlier than the last one if
            the best checkpoint is kept; None if no result was written.
        kept: Share of the changes of full fine-tuning that the model file preserves, or None.
        published: URL of the result on the hub with ``push_to_hub``, or None.
    """

    output_dir: Path
    adapter: Path | None
    steps: int
    total_steps: int
    signal_number: int | None
    samples: dict[str, Path]
    checkpoint: Path | None = None
    model: Path | None = None
    result_step: int | None = None
    kept: float | None = None
    published: str | None = None

    @property
    def interrupted(self) -> bool:
        """True if the run stopped before its end."""
        return self.signal_number is not None


class RunFiles:
    """Files of a run's output folder. Each step has at most one sample and one checkpoint.

    Args:
        run: The run. It is restored from the checkpoint of ``resume_from_checkpoint``.
        on_event: Called with each event (`dora_diffusion.training.events`).
        stop: Signals that stop the run.
    """

    def __init__(self, run: Run, on_event: events.OnEvent, stop: StopRequest) -> None:
        self.run, self.on_event, self.stop = run, on_event, stop
        self.output_dir = Path(run.config.output_dir)
        self.start = start = start_run(run, self.output_dir)
        self.is_main: bool = run.accelerator.is_main_process
        self.shards = shards_model(run.accelerator)
        self._sampled_at = -1
        self.trackers = Trackers(run.accelerator, bool(run.config.report_to))
        self.samples = SampleWriter(run, self.output_dir, self.trackers, on_event, stop)
        self.saver = CheckpointSaver(
            self.output_dir,
            every_steps=run.config.checkpointing_steps or 0,
            every_minutes=run.config.checkpointing_minutes,
            limit=run.config.checkpoints_total_limit,
            noun=run.weights.noun,
        )
        if start.checkpoint is not None:
            best = run.validation.best() if run.validation else None
            self.saver.resume_from(start.checkpoint, interim=start.is_interim, best=best)

    def open(self) -> None:
        """Clear the folder of later steps, open the log, and announce the run."""
        run, start = self.run, self.start
        self.stop.answer_with(SAVING)
        if self.is_main:
            clear_folder(self.output_dir, start.step)
            config = copied(run.config, self.output_dir / FEATURES)
            save_config(config, self.output_dir / "config.yaml", start.segments)
            save_record(self.output_dir, start.conditions)
            write_photo_record(self.output_dir, run.dataset.photos)
        log_file = self.output_dir / METRICS_NAME if self.is_main else None
        skips = MOST_SKIPPED if run.accelerator.scaler is not None else 0
        self.log = MetricsLog(log_file, start.step, self._on_step, skips)
        self.trackers.begin(tracked_settings(run.config))
        held_out = run.validation.photos if run.validation else ()
        self.on_event(
            events.TrainingStarted(
                step=start.step,
                total_steps=run.total_steps,
                resumed_from=start.checkpoint.name if start.checkpoint else None,
                steps_dropped=self.log.steps_dropped,
                photos=len(run.dataset),
                resolutions=run.resolutions,
                family=run.components.family.licensed_title,
                schedule=str(run.components.schedule),
                device=str(run.accelerator.device),
                adapter=run.report,
                started_from=run.weights.origin.get("init_adapter", ""),
                trigger=run.trigger,
                changed=start.changed,
                unused=start.unused,
                held_out=tuple(photo.path.name for photo in held_out),
            )
        )
        if start.checkpoint is None and (self.is_main or self.shards):
            run.initial = run.digest()

    def _on_step(self, record: dict[str, Any]) -> None:
        self.trackers.log_step(record)
        step, validation = record["step"], self.run.validation
        if validation is not None and is_validation(record):
            loss = record.get("validation_loss")
            self.on_event(events.Validated(step, loss, validation.best(), record))
        else:
            self.on_event(events.StepDone(step, self.run.total_steps, record["loss"], record))

    def validate(self, step: int, validation: Validation) -> None:
        """Compute and log the validation loss of a step."""
        self.log.flush()
        with self.run.in_use():
            self.log.add({"step": step, "validation_loss": validation.measure(step)})
        self.log.flush()

    def sample(self, step: int) -> None:
        """Write sample images of a step, with their similarity to held-out photos."""
        if step == self._sampled_at:
            return
        self._sampled_at = step
        self.log.flush()
        if (self.is_main or self.shards) and self.run.config.num_validation_images:
            with self.run.in_use():
                samples, validation = self.samples.at_step(step), self.run.validation
            similarity = validation.similarity(samples) if validation else None
            if similarity is not None:
                self.log.add({"step": step, "validation_similarity": similarity})
                self.log.flush()
        self.run.accelerator.wait_for_everyone()

    def checkpoint(self, step: int, *, interim: bool = False, is_best: bool = False) -> None:
        """Save a checkpoint, unless this step has one. A failure ends all processes."""
        self.log.flush()  # Numbers that are not finite raise here, before anything is written.
        failure: Exception | None = None
        is_new = self.is_main and self.saver.last_step != step
        # For a sharded model all processes gather their shards.
        if set_by_any(self.run.accelerator, is_new) if self.shards else is_new:
            try:
                path = self._save(step, interim=interim, is_best=is_best)
                if path is not None and not interim:
                    self.on_event(events.CheckpointSaved(step, path, self.saver.take_removed()))
            except Exception as error:
                failure = error
        if set_by_any(self.run.accelerator, failure is not None):
            raise failure or TrainingError(f"the first process could not save step {step}")

    def _save(
        self, step: int, *, interim: bool, is_best: bool = False, **state: Any
    ) -> Path | None:
        """Save a checkpoint; ``state`` overrides entries of the current state."""
        run, weights = self.run, self.run.weights

        def write(folder: Path) -> None:
            metadata = result_metadata(run, step)
            weights.check(weights.write_checkpoint(folder, metadata, now["parameters"]))

        run.activate()
        hooks = hook_states(run)
        with naming_step(weights.noun, step), run.in_use():
            now = state_of(run, self.start.segments, step)
            now |= {**hooks, "conditions": self.start.conditions, **state}
            if not self.is_main:
                return None
            stable = self.log.watch.is_stable
            return self.saver.save(
                step, now, write, interim=interim, is_best=is_best, is_stable=stable
            )

    def fail(self, error: Exception, step: int, data_position: Mapping[str, Any]) -> None:
        """Save the completed steps, if possible, before an error ends the run.

        Args:
            error: The error.
            step: Last completed step.
            data_position: Position in the data after that step.
        """
        if isinstance(error, TrainingError):
            with contextlib.suppress(TrainingError):
                self.log.flush()
        else:
            self._rescue(step, data_position)
        self.log.close()

    def _rescue(self, step: int, data_position: Mapping[str, Any]) -> None:
        """Save the completed steps as a temporary checkpoint before an error ends the run.

        Args:
            step: Last completed step.
            data_position: Position in the data after that step.
        """
        if not self.is_main or not self.start.step < step != self.saver.last_step:
            return
        failed = f"no checkpoint of step {step} was saved before the error"
        if self.shards and not self.run.config.trains_adapters:
            warnings.warn(f"{failed}, since other processes hold shards", stacklevel=3)
            return
        if not self.run.step.is_whole:
            warnings.warn(f"{failed}, which interrupted an update of the weights", stacklevel=3)
            return
        try:
            try:
                self.log.flush()
            except TrainingError:
                raise
            except Exception:  # Raised by a callback; the metrics were checked before.
                pass
            if path := self._save(step, interim=True, **data_position):
                warnings.warn(
                    f"an error ends the run after step {step}; {path.name} was saved first: "
                    "--resume_from_checkpoint latest resumes from there",
                    stacklevel=3,
                )
        except Exception as error:
            warnings.warn(f"{failed}: {error}", stacklevel=3)

    def finish(self, steps: int, *, is_complete: bool) -> TrainResult:
        """Write the result of a complete run, and close the log.

        Raises:
            TrainingError: If no trained number has moved. The files are written.
        """
        total_steps = self.run.total_steps
        self._tell_of_rise()
        self.log.close()
        written, result_step, kept, has_learned = None, None, None, True
        if is_complete and (self.is_main or self.shards):
            self.stop.answer_with(_FINISHING)
            with self.run.in_use():
                result_step = self._best_step(steps)
                has_learned = self._has_learned()
                path, kept = write_result(self.run, self.output_dir, result_step, self.samples)
            written = path if self.is_main else None  # Other processes only gathered their shards.
            if self.is_main:
                with warning_of_full_disk("run.json does not have the outcome of training"):
                    save_record(self.output_dir, self.start.conditions, has_learned)
        self.run.accelerator.wait_for_everyone()
        if written is not None and not has_learned:
            raise TrainingError(self._unlearned_message(written, steps))
        signal_number = None if is_complete else self.stop.signal_number
        self.on_event(events.TrainingEnded(steps, not is_complete, result_step))
        is_adapter = self.run.config.trains_adapters
        return TrainResult(
            self.output_dir,
            adapter=written if is_adapter else None,
            steps=steps,
            total_steps=total_steps,
            signal_number=signal_number,
            samples=self.samples.files,
            checkpoint=self.saver.newest,
            model=None if is_adapter else written,
            result_step=result_step,
            kept=kept,
        )

    def _has_learned(self) -> bool:
        """Return whether a trained number differs from its value before the first step.

        If all gradients were 0, weight decay alone has moved numbers.
        """
        is_decay = self.start.step == 0 and self.log.largest_norm == 0
        return self.run.digest() != self.run.initial and not is_decay

    def _unlearned_message(self, written: Path, steps: int) -> str:
        """Return the error for a run that has learned nothing."""
        rate = f"{self.run.config.unet_lr:g}"
        cause, fix = (
            "no trained number has moved",
            f"Raise learning_rate ({rate}) or max_train_steps ({steps}), or lower lr_warmup_steps",
        )
        if self.log.largest_norm == 0:
            cause, fix = "all gradients were 0", "Check the masks of the photos and mixed_precision"
        elif self.log.largest_norm == math.inf:
            cause, fix = "fp16 skipped every step", "Use --mixed_precision bf16 or no"
        start = self.run.weights.origin.get("init_adapter")
        has = f"equals init_adapter {start}, from which it started" if start else "has no effect"
        return f"nothing was learned: {cause}. {written} was written but {has}. {fix}"

    def _best_step(self, steps: int) -> int:
        """Load the weights of the result into the model. Returns their step."""
        if self.run.validation is None or not self.run.validation.keeps_best:
            return steps
        last_steps = {self.output_dir: steps}
        if self.start.checkpoint is not None:  # It may be in another run's folder.
            last_steps = {self.start.checkpoint.parent: self.start.step, **last_steps}
        checkpoints = {
            step_of(path): path
            for folder, last_step in last_steps.items()
            for path in checkpoints_in(folder)
            if step_of(path) <= last_step
        }
        return take_best(self.run, steps, checkpoints)

    def _tell_of_rise(self) -> None:
        """Warn of a loss that rose, and name the checkpoint from before."""
        watch = self.log.watch
        stable, risen_at = self.saver.newest_stable(watch.is_stable), watch.risen_at
        if risen_at is None or not self.is_main:
            return
        before = f"{stable} is from before" if stable else "no checkpoint is from before"
        warnings.warn(
            f"the loss rose far above its start by step {risen_at}, so the result may be damaged: "
            f"{before}; lower the learning rate",
            stacklevel=3,
        )
