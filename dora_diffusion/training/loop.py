"""Training, from settings to finished folders: runs that share a model take their steps together.

A run by itself is a pack of one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dora_diffusion.adapters.inject import DetachedAdapters
from dora_diffusion.config import TrainConfig, unusual_rates, without_effect
from dora_diffusion.data.images import reading_once
from dora_diffusion.export import hub
from dora_diffusion.models.precision import precision_of
from dora_diffusion.training import events
from dora_diffusion.training.engine.accelerator import make_accelerator
from dora_diffusion.training.engine.engine import TrainingEngine
from dora_diffusion.training.inputs.subject import Subject, outside_toy_world, subjects_of
from dora_diffusion.training.results.folders import output_folder
from dora_diffusion.training.results.metrics import TrainingError
from dora_diffusion.training.results.resume import start_run
from dora_diffusion.training.results.samples import check_prompts
from dora_diffusion.training.run import SAVING, Run, TrainResult
from dora_diffusion.training.session import LoadBase, open_session
from dora_diffusion.training.signals import Stopped, StopRequest

__all__ = ["TrainResult", "TrainingError", "train"]


def train(
    config: TrainConfig,
    on_event: events.OnEvent | None = None,
    *,
    load: LoadBase | None = None,
) -> TrainResult:
    """Teach a model a subject from photos, and write the result to ``config.output_dir``.

    ``push_to_hub`` publishes it, privately. SIGINT, SIGTERM and SIGHUP stop the run: before its
    first step at once, later with a checkpoint after the step. A second SIGINT or SIGTERM loses
    nothing; a third one ends the process.

    Args:
        config: All settings.
        on_event: Called in the main process with each of `dora_diffusion.training.events`.
        load: Loads the base model; a `models.load.BaseCache` keeps it for the next run.

    Raises:
        ConfigError, PhotoError, ModelNotFoundError, TargetError: Before anything is trained.
        TrainingError: If loss, gradients or weights stop being finite; nothing is written from
            there on, and what was there stays.
        ExportError: If it cannot be published; before training where that is known.
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
    config, subjects = checked(config)
    output_dir = Path(config.output_dir)
    with StopRequest() as stop, reading_once():
        try:
            accelerator = make_accelerator(config)
            is_main = accelerator.is_main_process
            show = on_event if on_event and is_main else events.ignore
            with output_folder(config) if is_main else contextlib.nullcontext():
                accelerator.wait_for_everyone()
                model, device = config.pretrained_model_name_or_path, str(accelerator.device)
                show(events.ModelLoading(model, device, config.mixed_precision))
                session = open_session(config, subjects, accelerator, show, load=load)
                loop = Loop(stop)
                with loop.leaving(""):
                    loop.begin("", Run(*start_run(session, output_dir), output_dir, show, stop))
                loop.train()
                accelerator.end_training()
                return _published(loop.results[""], config if is_main else None)
        except Stopped:
            return TrainResult(output_dir, None, 0, 0, stop.signal_number, {})


def _published(result: TrainResult, config: TrainConfig | None) -> TrainResult:
    """A result with its address on the hub, where its settings ask for one."""
    if config is None or not config.push_to_hub or result.interrupted:
        return result
    try:
        address = hub.push(config.output_dir, config.hub_model_id or "", private=True)
        return replace(result, published=address)
    except hub.HubError as error:
        raise hub.HubError(
            f"the result is in {config.output_dir}, but was not published: {error}"
        ) from error


@dataclass
class _Member:
    """A run, and its adapters."""

    run: Run
    adapters: DetachedAdapters


class Loop:
    """Runs that train together on one model until each has its result.

    Attributes:
        results: Of each that ended, or was interrupted, by its name.
        stop: Whoever asks all to stop.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.results: dict[str, TrainResult] = {}
        self.stop = stop
        self._members: dict[str, _Member] = {}
        self._attached: DetachedAdapters | None = None

    def begin(self, name: str, run: Run) -> None:
        """Add a run, whose adapters are on the model, and do what comes before its first step."""
        self._attached = DetachedAdapters.of(*run.session.weights.modules.values())
        self._members[name] = _Member(run, self._attached)
        run.begin()
        run.validate_start()

    def activate(self, name: str) -> None:
        """Attach a run's adapters to the model."""
        adapters = self._members[name].adapters
        if self._attached is not adapters:
            adapters.attach()
            self._attached = adapters

    def train(self) -> None:
        """Train all runs, until none is left."""
        engine: TrainingEngine | None = None
        while self._members:
            before = list(self._members)
            for name in before:
                with self.leaving(name):
                    if self._members[name].run.is_over():
                        self._end(name)
            if not self._members:
                return
            members = dict(self._members)
            if engine is None or list(members) != before:
                self.activate(next(iter(members)))
                learners = [member.run.session.learner for member in members.values()]
                engine = TrainingEngine(learners, [member.adapters for member in members.values()])
            try:
                outcomes = engine([member.run.step + 1 for member in members.values()])
            except Exception as error:
                outcomes = [error] * len(members)
            for (name, member), outcome in zip(members.items(), outcomes, strict=True):
                with self.leaving(name):
                    if isinstance(outcome, Exception):
                        raise outcome
                    member.run.take(outcome)
            if len(self._members) < len(members):
                engine = None

    def _end(self, name: str) -> None:
        """Write a run's result; it leaves."""
        run = self._members[name].run
        run.end()
        run.log.close()
        self.results[name] = run.finish(run.step)
        self.stop.answer_with(SAVING)
        # What it was written from is not what is on the model any more.
        del self._members[name]
        self._attached = None

    @contextlib.contextmanager
    def leaving(self, name: str) -> Iterator[None]:
        """An error inside is that of one run, which leaves after it has saved what it can."""
        try:
            yield
        except Exception as error:
            if (member := self._members.get(name)) is not None:
                if member.run.is_begun:
                    member.run.fail(error)
                    member.run.log.close()
                del self._members[name]
                self._attached = None
            self.left(name, error)

    def left(self, name: str, error: Exception) -> None:
        """Handle a run's error, which ends the loop."""
        raise error


def checked(config: TrainConfig) -> tuple[TrainConfig, list[Subject]]:
    """A run's settings with its precision, and its subjects; what cannot work is refused.

    Raises:
        ConfigError, HubError: Before anything is loaded.

    Warns:
        UserWarning: Of settings without effect, and of what the base model cannot learn.
    """
    config = config.with_sample_prompts()
    subjects = subjects_of(config)
    check_prompts(config)
    if config.push_to_hub:
        hub.check(config.hub_model_id or "")
    for reason in (*without_effect(config).values(), *unusual_rates(config)):
        warnings.warn(reason, stacklevel=3)
    base, words = config.pretrained_model_name_or_path, [s.class_word for s in subjects]
    if toy := next(filter(None, (outside_toy_world(base, word) for word in words)), ""):
        warnings.warn(f"{toy} Name another pretrained_model_name_or_path.", stacklevel=3)
    return replace(config, mixed_precision=precision_of(config.mixed_precision)), subjects
