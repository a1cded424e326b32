"""The training run, from settings to a finished folder."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_diffusion.config import TrainConfig, unusual_rates, without_effect
from dora_diffusion.data.photo_record import write_photo_record
from dora_diffusion.models.precision import precision_of
from dora_diffusion.training import events
from dora_diffusion.training.accelerator import (
    SharedFlags,
    make_accelerator,
    set_by_any,
    shards_model,
)
from dora_diffusion.training.checkpoint import (
    CheckpointSaver,
    checkpoints_in,
    state_of,
    step_of,
)
from dora_diffusion.training.folders import METRICS_NAME, clear_folder, output_folder
from dora_diffusion.training.metrics import (
    MOST_SKIPPED,
    MetricsLog,
    TrainingError,
    is_validation,
    naming_step,
)
from dora_diffusion.training.result import result_metadata, take_best, write_result
from dora_diffusion.training.resume import RunStart, save_config, start_run
from dora_diffusion.training.samples import SampleWriter, check_prompts
from dora_diffusion.training.session import Session, open_session
from dora_diffusion.training.stop import Stopped, StopRequest
from dora_diffusion.training.subject import outside_toy_world, subjects_of
from dora_diffusion.training.trackers import Trackers, tracked_settings

__all__ = ["TrainResult", "TrainingError", "train"]

_SAVING = "stopping after this step, and saving a checkpoint"
_FINISHING = "stopping: the result is being written, its sample images are left out"


@dataclass(frozen=True)
class TrainResult:
    """What a run has made.

    Attributes:
        output_dir: The run's folder.
        adapter: The adapter file, or None if the run was interrupted or trained the model itself.
        steps: Optimizer steps done.
        total_steps: Optimizer steps asked for; 0 if it was interrupted before that was known.
        signal_number: The signal that interrupted the run, or None.
        samples: Name -> image file, such as ``adapted`` and ``base``.
        checkpoint: The newest checkpoint to resume from, or None.
        model: The folder of the model that full fine-tuning made, or None.
        result_step: The step that the result is of, which with ``keep_best`` may be an earlier one;
            None if none was written.
        stopped_early: Whether ``early_stopping_patience`` ended it.
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
    stopped_early: bool = False

    @property
    def interrupted(self) -> bool:
        """Whether the run stopped before its end."""
        return self.signal_number is not None


def train(config: TrainConfig, on_event: events.OnEvent | None = None) -> TrainResult:
    """Teach a model a subject from photos, and write the result to ``config.output_dir``.

    SIGINT, SIGTERM and SIGHUP stop the run: before its first step at once, later with a checkpoint
    after the step. A second SIGINT or SIGTERM ends the process.

    Args:
        config: All settings.
        on_event: Called in the main process with each of `dora_diffusion.training.events`.

    Raises:
        ConfigError, PhotoError, ModelNotFoundError, TargetError: Before anything is trained.
        TrainingError: If loss, gradients or weights stop being finite; nothing is written from
            there on, and what was there stays.
        DiskFullError: If neither a checkpoint can be written nor its adapter alone, or not the
            adapter in the end; earlier checkpoints are kept.

    Any other error in the middle of training saves a checkpoint first.

    Example:
        >>> result = train(TrainConfig(
        ...     instance_data_dir="samples/bolt_mug", instance_prompt="a photo of a sks mug",
        ...     max_train_steps=2, num_validation_images=0, checkpointing_steps=0,
        ...     output_dir="demo-output/doctest", overwrite_output_dir=True))
        >>> result.adapter.name
        'pytorch_lora_weights.safetensors'
    """
    config = config.with_sample_prompts()
    subjects = subjects_of(config)
    check_prompts(config)
    for reason in (*without_effect(config).values(), *unusual_rates(config)):
        warnings.warn(reason, stacklevel=2)
    base, words = config.pretrained_model_name_or_path, [s.class_word for s in subjects]
    if toy := next(filter(None, (outside_toy_world(base, word) for word in words)), ""):
        warnings.warn(f"{toy} Name another pretrained_model_name_or_path.", stacklevel=2)
    config = replace(config, mixed_precision=precision_of(config.mixed_precision))
    output_dir = Path(config.output_dir)
    with StopRequest() as stop:
        try:
            accelerator = make_accelerator(config)
            is_main = accelerator.is_main_process
            show = on_event if on_event and is_main else events.ignore
            with output_folder(config) if is_main else contextlib.nullcontext():
                accelerator.wait_for_everyone()
                model, device = config.pretrained_model_name_or_path, str(accelerator.device)
                show(events.ModelLoading(model, device, config.mixed_precision))
                session = open_session(config, subjects, accelerator, show)
                run = _Run(*start_run(session, output_dir), output_dir, show, stop)
                result = run.finish(run.train())
                accelerator.end_training()
                return result
        except Stopped:
            return TrainResult(output_dir, None, 0, 0, stop.signal_number, {})


class _Run:
    """One run, and what writes its folder."""

    def __init__(
        self,
        session: Session,
        start: RunStart,
        output_dir: Path,
        on_event: events.OnEvent,
        stop: StopRequest,
    ) -> None:
        config = session.config
        self.session = session
        self.start = start
        self.output_dir = output_dir
        self.is_main: bool = session.accelerator.is_main_process
        self.shards = shards_model(session.accelerator)
        self.on_event = on_event
        self.stop = stop
        self.trackers = Trackers(session.accelerator, bool(config.report_to))
        self.samples = SampleWriter(session, output_dir, self.trackers, on_event, stop)
        self.saver = CheckpointSaver(
            output_dir,
            every_steps=config.checkpointing_steps or 0,
            every_minutes=config.checkpointing_minutes,
            limit=config.checkpoints_total_limit,
            noun=session.weights.noun,
        )
        if start.checkpoint is not None:
            best = session.validation.best() if session.validation else None
            self.saver.resume_from(start.checkpoint, interim=start.is_interim, best=best)

    def train(self) -> int:
        """Run all steps, or those until a signal. Returns the number of steps done."""
        session, step = self.session, self.start.step
        session.cache_ahead(session.total_steps - step, self.on_event)
        self.stop.answer_with(_SAVING)
        log = self._begin()
        if step == 0 and session.config.sample_at_start:
            self._sample(0, log)
        begun, any_set = time.perf_counter(), SharedFlags(session.accelerator)
        place = session.place()
        try:
            if self._validate(step, log):
                self._checkpoint(step, log, is_best=True)
            while True:
                stopping, overdue = any_set(
                    self.stop.requested, self.is_main and self.saver.is_overdue()
                )
                if stopping or self._is_complete(step):
                    break
                if overdue and step > self.start.step:
                    self._checkpoint(step, log, interim=True)
                record = session.train_step(step + 1)
                step, place = step + 1, session.place()
                seconds = round(time.perf_counter() - begun, 4)
                begun = time.perf_counter()
                log.add(record | {"seconds": seconds})
                is_best = self._validate(step, log)
                if step < session.total_steps and self._is_sampled(step):
                    self._sample(step, log)
                if self.saver.is_due(step) or is_best:
                    self._checkpoint(step, log, is_best=is_best)
            log.flush()
            if step > self.start.step and (self.saver.every_steps or not self._is_complete(step)):
                self._checkpoint(step, log)
            self._tell_of_rise(log)
        except TrainingError:
            with contextlib.suppress(TrainingError):
                log.flush()
            raise
        except Exception:
            self._rescue(step, place, log)
            raise
        finally:
            log.close()
        return step

    def finish(self, steps: int) -> TrainResult:
        """Write what was learned, sample from the written file, and write the card."""
        total_steps, written, result_step = self.session.total_steps, None, None
        is_complete = self._is_complete(steps)
        if is_complete and (self.is_main or self.shards):
            self.stop.answer_with(_FINISHING)
            result_step = self._best_step(steps)
            written = write_result(self.session, self.output_dir, result_step, self.samples)
        self.session.accelerator.wait_for_everyone()
        signal_number = None if is_complete else self.stop.signal_number
        stopped_early = is_complete and steps < total_steps
        self.on_event(events.TrainingEnded(steps, not is_complete, result_step, stopped_early))
        is_full = self.session.config.is_full
        return TrainResult(
            self.output_dir,
            None if is_full else written,
            steps,
            total_steps,
            signal_number,
            self.samples.files,
            self.saver.newest,
            written if is_full else None,
            result_step,
            stopped_early,
        )

    def _best_step(self, steps: int) -> int:
        """The step that the result is of, whose weights the model has afterwards."""
        if self.session.validation is None or not self.session.config.keep_best:
            return steps
        places = {self.output_dir: steps}
        if self.start.checkpoint is not None:  # It may be another run's, up to here.
            places = {self.start.checkpoint.parent: self.start.step, **places}
        found = [(at, last) for place, last in places.items() for at in checkpoints_in(place)]
        kept = {step_of(path): path for path, last in found if step_of(path) <= last}
        return take_best(self.session, steps, kept)

    def _is_complete(self, step: int) -> bool:
        """Whether no step is left after one, or patience with the validation loss is at its end."""
        validation = self.session.validation
        is_exhausted = validation is not None and validation.is_exhausted
        return step >= self.session.total_steps or is_exhausted

    def _begin(self) -> MetricsLog:
        session, start = self.session, self.start
        if self.is_main:
            clear_folder(self.output_dir, start.step)
            save_config(session.config, self.output_dir / "config.yaml", start.segments)
            write_photo_record(self.output_dir, session.dataset.photos)
        log_file = self.output_dir / METRICS_NAME if self.is_main else None
        skips = MOST_SKIPPED if session.accelerator.scaler is not None else 0
        log = MetricsLog(log_file, start.step, self._on_step, skips)
        self.trackers.begin(tracked_settings(session.config))
        held_out = session.validation.photos if session.validation else ()
        self.on_event(
            events.TrainingStarted(
                step=start.step,
                total_steps=session.total_steps,
                resumed_from=start.checkpoint.name if start.checkpoint else None,
                steps_dropped=log.steps_dropped,
                photos=len(session.dataset),
                resolution=session.resolution,
                family=session.components.family.title,
                schedule=str(session.components.schedule),
                device=str(session.accelerator.device),
                adapter=session.report,
                started_from=session.weights.origin.get("init_adapter", ""),
                trigger=session.trigger,
                changed=start.changed,
                unused=start.unused,
                held_out=tuple(photo.path.name for photo in held_out),
            )
        )
        return log

    def _on_step(self, record: dict[str, Any]) -> None:
        self.trackers.log_step(record)
        step, validation = record["step"], self.session.validation
        if validation is not None and is_validation(record):
            loss = record.get("validation_loss")
            self.on_event(events.Validated(step, loss, validation.best(), record))
        else:
            self.on_event(events.StepDone(step, self.session.total_steps, record["loss"], record))

    def _validate(self, step: int, log: MetricsLog) -> bool:
        """Take the validation loss if it is due. Returns whether the step is to be kept for it."""
        validation = self.session.validation
        if validation is None or not validation.is_due(step):
            return False
        log.flush()
        log.add({"step": step, "validation_loss": validation.measure(step)})
        log.flush()
        return self.session.config.keep_best and validation.best() == step

    def _checkpoint(
        self, step: int, log: MetricsLog, *, interim: bool = False, is_best: bool = False
    ) -> None:
        """Save a checkpoint, unless this step has tried to. All processes end if that fails."""
        log.flush()  # Numbers that are not finite raise here, before anything is written.
        failure: Exception | None = None
        is_new = self.is_main and self.saver.last_step != step
        # Of a sharded model every process gives its part.
        if set_by_any(self.session.accelerator, is_new) if self.shards else is_new:
            try:
                path = self._save(step, log, interim=interim, is_best=is_best)
                if path is not None and not interim:
                    self.on_event(events.CheckpointSaved(step, path))
            except Exception as error:
                failure = error
        if set_by_any(self.session.accelerator, failure is not None):
            raise failure or TrainingError(f"the first process could not save step {step}")

    def _save(
        self, step: int, log: MetricsLog, *, interim: bool, is_best: bool = False, **state: Any
    ) -> Path | None:
        """Save a checkpoint, with parts of its state that replace those of this moment."""
        session, weights = self.session, self.session.weights

        def write(folder: Path) -> None:
            metadata = result_metadata(session, step)
            weights.check(weights.write_checkpoint(folder, metadata, now["parameters"]))

        with naming_step(weights.noun, step):
            now = {**state_of(session, self.start.segments, step), **state}
            if not self.is_main:
                return None
            calm = log.watch.is_calm
            return self.saver.save(step, now, write, interim=interim, is_best=is_best, is_calm=calm)

    def _rescue(self, step: int, place: Mapping[str, Any], log: MetricsLog) -> None:
        """Before an error ends the run, save its steps as a checkpoint in between.

        Args:
            step: The last one that is done.
            place: Where the run stood in its data after that step.
            log: Of its numbers.
        """
        if not self.is_main or not self.start.step < step != self.saver.last_step:
            return
        failed = f"no checkpoint of step {step} was saved before the error"
        if self.shards and self.session.config.is_full:
            warnings.warn(f"{failed}, since parts are in the other processes", stacklevel=3)
            return
        if not self.session.train_step.is_whole:
            warnings.warn(f"{failed}, which came while the weights were changed", stacklevel=3)
            return
        try:
            try:
                log.flush()
            except TrainingError:
                raise
            except Exception:  # Of whoever watches the numbers, which are looked at before.
                pass
            if path := self._save(step, log, interim=True, **place):
                warnings.warn(
                    f"an error ends the run after step {step}; {path.name} was saved first: "
                    "--resume_from_checkpoint latest resumes from there",
                    stacklevel=3,
                )
        except Exception as error:
            warnings.warn(f"{failed}: {error}", stacklevel=3)

    def _tell_of_rise(self, log: MetricsLog) -> None:
        """At the end, name the checkpoint from before the loss rose."""
        calm, risen_at = self.saver.newest_calm(log.watch.is_calm), log.watch.risen_at
        if risen_at is None or not self.is_main:
            return
        before = f"{calm} is from before" if calm else "no checkpoint is from before"
        warnings.warn(
            f"the loss rose far above its start by step {risen_at}, so what was learned may be "
            f"damaged: {before}; a lower learning rate helps",
            stacklevel=3,
        )

    def _is_sampled(self, step: int) -> bool:
        every = self.session.config.validation_steps
        return bool(every) and step % (every or 1) == 0

    def _sample(self, step: int, log: MetricsLog) -> None:
        log.flush()
        if (self.is_main or self.shards) and self.session.config.num_validation_images:
            samples, validation = self.samples.at_step(step), self.session.validation
            similarity = validation.similarity(samples) if validation else None
            if similarity is not None:
                log.add({"step": step, "validation_similarity": similarity})
                log.flush()
        self.session.accelerator.wait_for_everyone()
