"""The training run, from settings to a finished folder."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dora_diffusion.adapters.inject import disabled, remove_adapters
from dora_diffusion.adapters.state import adapter_state, load_adapter_state, module_shapes
from dora_diffusion.config import ConfigError, TrainConfig, without_effect
from dora_diffusion.formats.adapter_file import AdapterMetadata, find_adapter, read_adapter
from dora_diffusion.formats.atomic_file import save_text
from dora_diffusion.formats.sgm_blocks import UNetLayout
from dora_diffusion.models.precision import precision_of
from dora_diffusion.numerics.weights import LayerWeights
from dora_diffusion.pictures import save_png
from dora_diffusion.training.checkpoint import (
    checkpoints_after,
    checkpoints_in,
    find_checkpoint,
    load_state,
    parameters_by_name,
    restore_optimizer,
    restore_parameters,
    save_checkpoint,
)
from dora_diffusion.training.continuity import first_segment, segments_after
from dora_diffusion.training.metrics import MetricsLog, TrainingError
from dora_diffusion.training.result import (
    adapter_metadata,
    drop_result,
    model_card,
    save_config,
    write_result_adapter,
)
from dora_diffusion.training.session import Session, make_accelerator, open_session
from dora_diffusion.training.stop import StopRequest
from dora_diffusion.training.subject import subject_of
from dora_diffusion.training.validation import Validation, side_by_side

__all__ = ["TrainResult", "TrainingError", "train"]

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run has made.

    Attributes:
        output_dir: The run's folder.
        adapter: The adapter file, or None if the run was interrupted.
        steps: Optimizer steps done.
        total_steps: Optimizer steps asked for.
        signal_number: The signal that interrupted the run, or None.
        samples: Caption -> picture.
    """

    output_dir: Path
    adapter: Path | None
    steps: int
    total_steps: int
    signal_number: int | None
    samples: dict[str, Path]

    @property
    def interrupted(self) -> bool:
        """Whether the run stopped, with a checkpoint, before its end."""
        return self.signal_number is not None


def train(config: TrainConfig, on_event: OnEvent | None = None) -> TrainResult:
    """Teach a model a subject from photos, and write the result to ``config.output_dir``.

    Args:
        config: All settings.
        on_event: Called in the main process with ``{"event": "load" | "start" | "step" |
            "sample" | "checkpoint" | "done", ...}``.

    Raises:
        ConfigError, PhotoError, ModelNotFoundError, TargetError: Before anything is trained.
        TrainingError: If the loss stops being finite.
        DiskFullError: If a file cannot be written; earlier checkpoints are kept.

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
    accelerator = make_accelerator(config)
    output_dir = Path(config.output_dir)
    if accelerator.is_main_process:
        _check_output(config, output_dir)
        (on_event or _ignore)(
            {
                "event": "load",
                "model": config.pretrained_model_name_or_path,
                "device": str(accelerator.device),
                "precision": config.mixed_precision,
            }
        )
    accelerator.wait_for_everyone()
    session = open_session(config, subject, accelerator)
    run = _Run(session, output_dir, on_event or _ignore)
    with StopRequest() as stop:
        done = run.train(stop)
    result = run.finish(done, stop)
    accelerator.end_training()
    return result


def _ignore(event: dict[str, Any]) -> None:
    pass


def _check_output(config: TrainConfig, output_dir: Path) -> None:
    """Never write over another run's result by accident."""
    resuming = config.resume_from_checkpoint or config.overwrite_output_dir
    if not resuming and output_dir.is_dir():
        finished = any(output_dir.glob("*.safetensors"))
        if finished or checkpoints_in(output_dir):
            raise ConfigError(
                f"output_dir {output_dir} already holds a trained adapter or checkpoints; choose "
                "another, go on with --resume_from_checkpoint latest, or --overwrite_output_dir"
            )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make output_dir {output_dir}: {error.strerror}") from error


class _Run:
    """The state of one run, and what it writes."""

    def __init__(self, session: Session, output_dir: Path, on_event: OnEvent) -> None:
        self.session = session
        self.config = session.config
        self.output_dir = output_dir
        self.is_main: bool = session.accelerator.is_main_process
        self.on_event = on_event if self.is_main else _ignore
        self.validation = Validation.from_config(session.config, session.resolution)
        self.samples: dict[str, Path] = {}
        self.segments = [first_segment(session.config)]
        self.changed: dict[str, tuple[Any, Any]] = {}

    def train(self, stop: StopRequest) -> int:
        """Run all steps, or those until a signal. Returns the number of steps done."""
        session, config = self.session, self.config
        start = self._resume()
        self._begin(start)
        log_file = self.output_dir / "metrics.jsonl" if self.is_main else None
        log = MetricsLog(log_file, start, self._on_step)
        step, begun = start, time.perf_counter()
        try:
            while step < session.total_steps and not self._stop_asked(stop):
                step += 1
                record = session.train_step(step)
                seconds = round(time.perf_counter() - begun, 4)
                begun = time.perf_counter()
                log.add(record | {"seconds": seconds})
                if step < session.total_steps and self._due(config.validation_steps, step):
                    self._sample(f"step-{step:06d}")
                if self._due(config.checkpointing_steps, step):
                    log.flush()
                    self._checkpoint(step)
            log.flush()
        finally:
            log.close()
        if step < session.total_steps and not self._due(config.checkpointing_steps, step):
            self._checkpoint(step)
        return step

    @staticmethod
    def _due(every: int | None, step: int) -> bool:
        return bool(every) and step % (every or 1) == 0

    def _stop_asked(self, stop: StopRequest) -> bool:
        """Whether any process was asked to stop: all must leave at the same step."""
        accelerator = self.session.accelerator
        if accelerator.num_processes == 1:
            return stop.requested
        asked = torch.tensor(float(stop.requested), device=accelerator.device)
        return bool(accelerator.reduce(asked, reduction="sum").item())

    def _begin(self, start: int) -> None:
        session = self.session
        if self.is_main:
            for old in checkpoints_after(self.output_dir, start):
                shutil.rmtree(old, ignore_errors=True)
            if not start:
                drop_result(self.output_dir)
            save_config(self.config, self.output_dir / "config.yaml", self.segments)
        if self.config.report_to:
            session.accelerator.init_trackers("dreambooth")
        self.on_event(
            {
                "event": "start",
                "step": start,
                "total_steps": session.total_steps,
                "photos": len(session.dataset),
                "resolution": session.resolution,
                "family": session.components.family.title,
                "device": str(session.accelerator.device),
                "adapter": str(session.report),
                "trigger": session.subject.trigger,
                "changed": self.changed,
            }
        )

    def _on_step(self, record: dict[str, Any]) -> None:
        numbers = {"loss": record["loss"], "grad_norm": record["grad_norm"]}
        if self.config.report_to:
            self.session.accelerator.log(numbers | record["lr"], step=record["step"])
        self.on_event({"event": "step", "total_steps": self.session.total_steps, **record})

    def _resume(self) -> int:
        """Put a checkpoint's state into the session. Returns the step it was saved at."""
        if not self.config.resume_from_checkpoint:
            return 0
        session = self.session
        path = find_checkpoint(self.config.resume_from_checkpoint, self.output_dir)
        state = load_state(path, self.config, session.dataset.contents())
        self.segments, self.changed = segments_after(state, self.config)
        self._check_later(int(state["step"]))
        restore_parameters(session.trained, state["parameters"])
        restore_optimizer(session.optimizer, session.lr_schedule, state)
        session.sampler.load_state_dict(state["sampler"])
        if state["scaler"] is not None and session.accelerator.scaler is not None:
            session.accelerator.scaler.load_state_dict(state["scaler"])
        return int(state["step"])

    def _check_later(self, start: int) -> None:
        """Refuse to mix this run's checkpoints with later ones of the run that it leaves."""
        later = checkpoints_after(self.output_dir, start)
        if later and not self.config.overwrite_output_dir:
            raise ConfigError(
                f"{self.output_dir} holds checkpoints after step {start} ({later[-1].name}); go on "
                "from there with --resume_from_checkpoint latest, choose another output_dir, or "
                "drop them with --overwrite_output_dir"
            )

    def _checkpoint(self, step: int) -> None:
        session = self.session
        if self.is_main:
            scaler = session.accelerator.scaler
            state = {
                "step": step,
                "config": self.config.to_dict(),
                "contents": session.dataset.contents(),
                "segments": self.segments,
                "parameters": {
                    name: p.detach().cpu()
                    for name, p in parameters_by_name(session.trained).items()
                },
                "optimizer": session.optimizer.state_dict(),
                "lr_schedule": session.lr_schedule.state_dict(),
                "sampler": session.sampler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            path = save_checkpoint(
                self.output_dir,
                step,
                state,
                lambda folder: self._write_adapter(folder, step, adapter_state(session.trained)),
                limit=self.config.checkpoints_total_limit,
            )
            self.on_event({"event": "checkpoint", "step": step, "path": str(path)})
        session.accelerator.wait_for_everyone()

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

    def _sample(self, name: str) -> Path | None:
        """Sample the fixed prompts into ``samples/NAME.png``."""
        path = None
        if self.is_main and self.config.num_validation_images:
            grid = self.validation.grid(self.session.components)
            path = save_png(grid, self.output_dir / "samples" / f"{name}.png")
            self.on_event({"event": "sample", "path": str(path), "name": name})
        self.session.accelerator.wait_for_everyone()
        return path

    def finish(self, steps: int, stop: StopRequest) -> TrainResult:
        """Write the adapter, sample from the written file, and write the card."""
        session, adapter = self.session, None
        complete = steps >= session.total_steps
        if complete and self.is_main:
            layers = adapter_state(session.trained)
            adapter = self._write_adapter(self.output_dir, steps, layers)
            self._reload(adapter)
            self._sample_base_and_adapted()
            if picture := self.samples.get("adapted"):
                self._write_adapter(self.output_dir, steps, layers, picture)
            self._write_card(adapter, steps)
        session.accelerator.wait_for_everyone()
        signal_number = None if complete else stop.signal_number
        self.on_event({"event": "done", "step": steps, "interrupted": not complete})
        return TrainResult(
            self.output_dir, adapter, steps, session.total_steps, signal_number, self.samples
        )

    def _reload(self, adapter: Path) -> None:
        """Replace the live adapter by what the file holds: samples then show the file."""
        components = self.session.components.adaptable()
        for model in self.session.trained.values():
            remove_adapters(model)
        layers = read_adapter(adapter, module_shapes(components)).layers
        load_adapter_state(components, layers)

    def _sample_base_and_adapted(self) -> None:
        if not self.config.num_validation_images:
            return
        components, folder = self.session.components, self.output_dir / "samples"
        adapted = self.validation.grid(components)
        with disabled(*components.adaptable().values()):
            base = self.validation.grid(components)
        captions = {
            "adapted": adapted,
            "base": base,
            "base_above_adapted": side_by_side([base, adapted]),
        }
        for name, image in captions.items():
            self.samples[name] = save_png(image, folder / f"{name}.png")
            self.on_event({"event": "sample", "path": str(self.samples[name]), "name": name})

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
