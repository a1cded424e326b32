"""The training run, from settings to a finished folder."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dora_diffusion.adapters.inject import disabled, remove_adapters
from dora_diffusion.adapters.state import adapter_state, load_adapter_state, module_shapes
from dora_diffusion.config import ConfigError, TrainConfig, without_effect
from dora_diffusion.data.photo_record import write_photo_record
from dora_diffusion.formats.adapter.file import AdapterMetadata, find_adapter, read_adapter
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.names.sgm_blocks import UNetLayout
from dora_diffusion.generate import image_grid
from dora_diffusion.images import save_png
from dora_diffusion.models.precision import precision_of
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.training.checkpoint import (
    checkpoints_after,
    find_checkpoint,
    folders_after,
    load_state,
    parameters_by_name,
    restore_optimizer,
    restore_parameters,
)
from dora_diffusion.training.continuity import (
    first_segment,
    saved_segments,
    segments_after,
    without_more_steps,
)
from dora_diffusion.training.events import OnEvent, ignore
from dora_diffusion.training.folders import METRICS_NAME, output_folder
from dora_diffusion.training.metrics import MetricsLog, TrainingError
from dora_diffusion.training.result import (
    adapter_metadata,
    drop_result,
    model_card,
    save_config,
    write_result_adapter,
)
from dora_diffusion.training.saving import CheckpointSaver
from dora_diffusion.training.session import Session, make_accelerator, open_session
from dora_diffusion.training.sheets import stacked
from dora_diffusion.training.stop import Stopped, StopRequest
from dora_diffusion.training.subject import subject_of
from dora_diffusion.training.trackers import Trackers, tracked_settings
from dora_diffusion.training.validation import Validation

__all__ = ["TrainResult", "TrainingError", "train"]

_SAVING = "stopping after this step, and saving a checkpoint"
_FINISHING = "stopping: the adapter is being written, its sample images are left out"


@dataclass(frozen=True)
class TrainResult:
    """What a run has made.

    Attributes:
        output_dir: The run's folder.
        adapter: The adapter file, or None if the run was interrupted.
        steps: Optimizer steps done.
        total_steps: Optimizer steps asked for; 0 if it was interrupted before that was known.
        signal_number: The signal that interrupted the run, or None.
        samples: Caption -> image.
        checkpoint: The newest checkpoint to resume from, or None.
    """

    output_dir: Path
    adapter: Path | None
    steps: int
    total_steps: int
    signal_number: int | None
    samples: dict[str, Path]
    checkpoint: Path | None = None

    @property
    def interrupted(self) -> bool:
        """Whether the run stopped before its end."""
        return self.signal_number is not None


class _SamplingStopped(Exception):
    """A signal came while sample images were made."""


def train(config: TrainConfig, on_event: OnEvent | None = None) -> TrainResult:
    """Teach a model a subject from photos, and write the result to ``config.output_dir``.

    SIGINT, SIGTERM and SIGHUP stop the run: before its first step at once, later with a checkpoint
    after the step. A second SIGINT or SIGTERM ends the process.

    Args:
        config: All settings.
        on_event: Called in the main process with ``{"event": "load" | "class_images" | "start" |
            "step" | "sampling" | "sample" | "checkpoint" | "done", ...}``.

    Raises:
        ConfigError, PhotoError, ModelNotFoundError, TargetError: Before anything is trained.
        TrainingError: If the loss stops being finite.
        DiskFullError: If the adapter cannot be written in the end; checkpoints are kept. A
            checkpoint that cannot be written is a warning.

    Example:
        >>> result = train(TrainConfig(
        ...     instance_data_dir="samples/bolt_mug", instance_prompt="a photo of a sks mug",
        ...     max_train_steps=2, num_validation_images=0, checkpointing_steps=0,
        ...     output_dir="demo-output/doctest", overwrite_output_dir=True))
        >>> result.adapter.name
        'pytorch_lora_weights.safetensors'
    """
    subject = subject_of(config)
    for reason in without_effect(config).values():
        warnings.warn(reason, stacklevel=2)
    config = replace(config, mixed_precision=precision_of(config.mixed_precision))
    with StopRequest() as stop:
        try:
            accelerator = make_accelerator(config)
            show = on_event if on_event and accelerator.is_main_process else ignore
            main = accelerator.is_main_process
            with output_folder(config) if main else contextlib.nullcontext():
                accelerator.wait_for_everyone()
                show(
                    {
                        "event": "load",
                        "model": config.pretrained_model_name_or_path,
                        "device": str(accelerator.device),
                        "precision": config.mixed_precision,
                    }
                )
                session = open_session(config, subject, accelerator, show)
                run = _Run(session, Path(config.output_dir), show, stop)
                result = run.finish(run.train())
                accelerator.end_training()
                return result
        except Stopped:
            return TrainResult(Path(config.output_dir), None, 0, 0, stop.signal_number, {})


class _Run:
    """The state of one run, and what it writes."""

    def __init__(
        self, session: Session, output_dir: Path, on_event: OnEvent, stop: StopRequest
    ) -> None:
        self.session = session
        self.config = session.config
        self.output_dir = output_dir
        self.is_main: bool = session.accelerator.is_main_process
        self.on_event = on_event
        self.stop = stop
        self.validation = Validation.from_config(session.config, session.resolution)
        self.trackers = Trackers(session.accelerator, bool(session.config.report_to))
        self.saver = CheckpointSaver(
            output_dir,
            every_steps=session.config.checkpointing_steps,
            every_minutes=session.config.checkpointing_minutes,
            limit=session.config.checkpoints_total_limit,
        )
        self.samples: dict[str, Path] = {}
        self.segments = [first_segment(session.config)]
        self.changed: dict[str, tuple[Any, Any]] = {}
        self.unused: dict[str, tuple[Any, Any]] = {}

    def train(self) -> int:
        """Run all steps, or those until a signal. Returns the number of steps done."""
        session, config = self.session, self.config
        start = self._resume()
        self.stop.answer_with(_SAVING)
        log = self._begin(start)
        step, begun = start, time.perf_counter()
        try:
            while True:
                stopping, overdue = self._agreed(self.stop.requested, self.saver.is_overdue())
                if stopping or step >= session.total_steps:
                    break
                if overdue and step > start:
                    self._checkpoint(step, log, interim=True)
                step += 1
                record = session.train_step(step)
                seconds = round(time.perf_counter() - begun, 4)
                begun = time.perf_counter()
                log.add(record | {"seconds": seconds})
                if step < session.total_steps and self._is_sampled(step):
                    self._sample_step(step)
                if self.saver.is_due(step):
                    self._checkpoint(step, log)
            log.flush()
            if step > start and (config.checkpointing_steps or step < session.total_steps):
                self._checkpoint(step, log)
        finally:
            log.close()
        return step

    def _is_sampled(self, step: int) -> bool:
        every = self.config.validation_steps
        return bool(every) and step % (every or 1) == 0

    def _agreed(self, *flags: bool) -> list[bool]:
        """Which flags any process has set: all must leave, and save, at the same step."""
        accelerator = self.session.accelerator
        if accelerator.num_processes == 1:
            return list(flags)
        asked = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
        return [bool(count) for count in accelerator.reduce(asked, reduction="sum").tolist()]

    def _begin(self, start: int) -> MetricsLog:
        session = self.session
        if self.is_main:
            unfinished = self.output_dir.glob(".checkpoint-*.tmp")
            for old in [*folders_after(self.output_dir, start), *unfinished]:
                shutil.rmtree(old, ignore_errors=True)
            if not start:
                drop_result(self.output_dir)
            save_config(self.config, self.output_dir / "config.yaml", self.segments)
            write_photo_record(self.output_dir, session.dataset.photos)
        log_file = self.output_dir / METRICS_NAME if self.is_main else None
        log = MetricsLog(log_file, start, self._on_step)
        self.trackers.begin(
            tracked_settings(
                self.config, resolution=session.resolution, max_train_steps=session.total_steps
            )
        )
        self.on_event(
            {
                "event": "start",
                "step": start,
                "total_steps": session.total_steps,
                "resumed_from": self.saver.newest.name if self.saver.newest else None,
                "steps_dropped": log.steps_dropped,
                "photos": len(session.dataset),
                "resolution": session.resolution,
                "family": session.components.family.title,
                "device": str(session.accelerator.device),
                "adapter": str(session.report),
                "trigger": session.subject.trigger,
                "changed": self.changed,
                "unused": self.unused,
            }
        )
        return log

    def _on_step(self, record: dict[str, Any]) -> None:
        self.trackers.log_step(record)
        self.on_event({"event": "step", "total_steps": self.session.total_steps, **record})

    def _resume(self) -> int:
        """Put a checkpoint's state into the session. Returns the step it was saved at."""
        if not self.config.resume_from_checkpoint:
            return 0
        session = self.session
        path = find_checkpoint(self.config.resume_from_checkpoint, self.output_dir)
        state = load_state(path, self.config, session.dataset.contents())
        self._check_steps(path, int(state["step"]))
        if int(state["step"]) == session.total_steps:
            self.config, self.unused = without_more_steps(state, self.config)
            self.segments = saved_segments(state)
        else:
            self.segments, self.changed = segments_after(state, self.config)
        restore_parameters(session.trained, state["parameters"])
        restore_optimizer(session.optimizer, session.lr_schedule, state)
        session.sampler.load_state_dict(state["sampler"])
        if state["scaler"] is not None and session.accelerator.scaler is not None:
            session.accelerator.scaler.load_state_dict(state["scaler"])
        self.saver.resume_from(path, interim=bool(state.get("interim")))
        return int(state["step"])

    def _check_steps(self, path: Path, start: int) -> None:
        """Refuse what a checkpoint has passed, and to mix with later ones of the run it leaves."""
        total = self.session.total_steps
        if start > total:
            raise ConfigError(
                f"{path.name} has {start} steps, more than the {total} that are asked for; set "
                f"--max_train_steps to more than {start}, or resume from an earlier checkpoint"
            )
        later = checkpoints_after(self.output_dir, start)
        if later and not self.config.overwrite_output_dir:
            raise ConfigError(
                f"{self.output_dir} holds checkpoints after step {start} ({later[-1].name}); "
                "resume from there with --resume_from_checkpoint latest, choose another "
                "output_dir, or drop them with --overwrite_output_dir"
            )

    def _checkpoint(self, step: int, log: MetricsLog, *, interim: bool = False) -> None:
        """Save a checkpoint, unless this step has tried to."""
        session, saver = self.session, self.saver
        log.flush()  # A loss that is not finite raises here, before it is saved.
        if self.is_main and saver.last_step != step:
            path = saver.save(
                step,
                self._state(step),
                lambda folder: self._write_adapter(folder, step, adapter_state(session.trained)),
                interim=interim,
            )
            if path is not None and not interim:
                self.on_event({"event": "checkpoint", "step": step, "path": str(path)})
        session.accelerator.wait_for_everyone()

    def _state(self, step: int) -> dict[str, Any]:
        session = self.session
        scaler = session.accelerator.scaler
        return {
            "step": step,
            "config": self.config.to_dict(),
            "contents": session.dataset.contents(),
            "segments": self.segments,
            "parameters": {
                name: p.detach().cpu() for name, p in parameters_by_name(session.trained).items()
            },
            "optimizer": session.optimizer.state_dict(),
            "lr_schedule": session.lr_schedule.state_dict(),
            "sampler": session.sampler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def _metadata(self, steps: int) -> AdapterMetadata:
        session = self.session
        return adapter_metadata(
            session.components,
            self.config,
            session.subject,
            session.resolution,
            steps,
            session.dataset.captions,
        )

    def _write_adapter(
        self, folder: Path, steps: int, layers: dict[str, LayerWeights], picture: Path | None = None
    ) -> Path:
        layout = UNetLayout.from_config(self.session.components.unet.config)
        return write_result_adapter(folder, layers, self._metadata(steps), layout, picture)

    def finish(self, steps: int) -> TrainResult:
        """Write the adapter, sample from the written file, and write the card."""
        session, adapter = self.session, None
        complete = steps >= session.total_steps
        if complete and self.is_main:
            self.stop.answer_with(_FINISHING)
            layers = adapter_state(session.trained)
            adapter = self._write_adapter(self.output_dir, steps, layers)
            self._reload(adapter)
            with _warning_of("the adapter is written, but not all of its samples and card"):
                self._sample_base_and_adapted(steps, layers)
                self._write_card(adapter, steps)
        session.accelerator.wait_for_everyone()
        signal_number = None if complete else self.stop.signal_number
        self.on_event({"event": "done", "step": steps, "interrupted": not complete})
        return TrainResult(
            self.output_dir,
            adapter,
            steps,
            session.total_steps,
            signal_number,
            self.samples,
            self.saver.newest,
        )

    def _reload(self, adapter: Path) -> None:
        """Replace the live adapter by what the file holds: samples then show the file."""
        components = self.session.components.adaptable()
        for model in self.session.trained.values():
            remove_adapters(model)
        layers = read_adapter(adapter, module_shapes(components)).layers
        load_adapter_state(components, layers)

    def _sample_step(self, step: int) -> None:
        """Sample the fixed prompts into ``samples/step-STEP.png``."""
        if self.is_main and self.config.num_validation_images:
            title = f"Step {step} of {self.session.total_steps}, with the adapter"
            with _warning_of(f"no samples at step {step}"), contextlib.suppress(_SamplingStopped):
                self._save_sheet(f"step-{step:06d}", self._images(), title, step)
        self.session.accelerator.wait_for_everyone()

    def _images(self) -> list[Image.Image]:
        def show(done: int, total: int) -> None:
            if self.stop.requested:
                raise _SamplingStopped
            self.on_event({"event": "sampling", "done": done, "total": total})

        return self.validation.images(self.session.components, show)

    def _sample_base_and_adapted(self, step: int, layers: dict[str, LayerWeights]) -> None:
        """Sample with the adapter and without it, at the same seeds."""
        if not self.config.num_validation_images:
            return
        components = self.session.components
        with contextlib.suppress(_SamplingStopped):
            images = self._images()
            title = f"After {step} steps, with the adapter"
            adapted = self._save_sheet("adapted", images, title, step)
            self._write_thumbnail(images, step, layers)
            with disabled(*components.adaptable().values()):
                images = self._images()
            base = self._save_sheet("base", images, "The base model", step, adapter=False)
            text = self._parameters(images[0].size, step, adapter=True)
            self._save("base_above_adapted", stacked([base, adapted]), text)

    def _save_sheet(
        self,
        name: str,
        images: Sequence[Image.Image],
        title: str,
        step: int,
        *,
        adapter: bool = True,
    ) -> Image.Image:
        sheet = self.validation.sheet(images, title)
        self._save(name, sheet, self._parameters(images[0].size, step, adapter=adapter))
        tag = "samples/adapter" if adapter else "samples/base"
        self.trackers.log_image(tag, sheet, step)
        return sheet

    def _parameters(self, size: tuple[int, int], step: int, *, adapter: bool) -> str:
        run, base = str(self.output_dir), self.config.pretrained_model_name_or_path
        return self.validation.parameters(size, base, run if adapter else None, step)

    def _save(self, name: str, image: Image.Image, parameters: str) -> None:
        path = save_png(image, self.output_dir / "samples" / f"{name}.png", parameters)
        if not name.startswith("step-"):
            self.samples[name] = path
        self.on_event({"event": "sample", "path": str(path), "name": name})

    def _write_thumbnail(
        self, images: Sequence[Image.Image], steps: int, layers: dict[str, LayerWeights]
    ) -> None:
        """Write the adapter again, with the samples small inside, without their labels."""
        grid = image_grid(images, columns=len(self.validation.seeds))
        with tempfile.TemporaryDirectory() as folder:
            file = save_png(grid, Path(folder) / "thumbnail.png")
            self._write_adapter(self.output_dir, steps, layers, file)

    def _write_card(self, adapter: Path, steps: int) -> None:
        titles = {"adapted": "With the adapter", "base": "Without it, at the same seeds"}
        pictures = {
            title: self.samples[name].relative_to(self.output_dir).as_posix()
            for name, title in titles.items()
            if name in self.samples
        }
        card = model_card(
            self.config,
            self.session.subject,
            self._metadata(steps),
            find_adapter(adapter),
            str(self.session.report),
            pictures,
        )
        save_text(self.output_dir / "README.md", card)


@contextlib.contextmanager
def _warning_of(what: str) -> Iterator[None]:
    """Turn a disk that refuses into a warning: what it refuses is not worth the run."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what}: {error.strerror or error}", stacklevel=3)
