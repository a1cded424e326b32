"""Training, from settings to finished folders: runs that share a model take their steps together.

A run by itself is a pack of one. Subjects of a pack train on one base, each an adapter of its own.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dora_diffusion.adapters.inject import AdapterSet
from dora_diffusion.config import ConfigError, TrainConfig, unusual_rates, without_effect
from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.fields import require, shown
from dora_diffusion.config.subject_list import SHARED
from dora_diffusion.data.images import reading_once
from dora_diffusion.export import hub
from dora_diffusion.models.components import Components
from dora_diffusion.models.precision import precision_of
from dora_diffusion.training import events
from dora_diffusion.training.engine.accelerator import make_accelerator
from dora_diffusion.training.engine.step import TrainingEngine
from dora_diffusion.training.inputs.dataset import list_subjects
from dora_diffusion.training.inputs.subject import Subject, outside_toy_world, subjects_of
from dora_diffusion.training.results.checkpoint import checkpoints_in
from dora_diffusion.training.results.folders import output_folder
from dora_diffusion.training.results.metrics import TrainingError
from dora_diffusion.training.results.record import has_learned_nothing
from dora_diffusion.training.results.resume import start_run
from dora_diffusion.training.results.write import check_prompts
from dora_diffusion.training.run import SAVING, Run, TrainResult
from dora_diffusion.training.session import LoadBase, load_base, open_session
from dora_diffusion.training.signals import Stopped, StopRequest

__all__ = ["TrainResult", "TrainingError", "train"]


@check_arguments()
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
                loop = Loop(stop)
                with loop.leaving(""):
                    loop.begin("", config, subjects, accelerator, show, load=load)
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


class Loop:
    """Runs that train together on one model until each has its result.

    Attributes:
        results: Of each that ended, or was interrupted, by its name.
        stop: Whoever asks all to stop.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.results: dict[str, TrainResult] = {}
        self.stop = stop
        self._runs: dict[str, Run] = {}
        self._attached: AdapterSet | None = None

    def begin(
        self, name: str, config: TrainConfig, subjects: list[Subject], accelerator: Any,
        show: events.OnEvent, base: Components | None = None, load: LoadBase | None = None,
    ) -> None:  # fmt: skip
        """Add a run, whose adapters are on the model then, and do what precedes its first step."""
        session = open_session(config, subjects, accelerator, show, base, load)
        session = replace(session, activate=partial(self.activate, name))
        folder = Path(config.output_dir)
        run = Run(*start_run(session, folder), folder, show, self.stop)
        self._runs[name], self._attached = run, run.adapters
        run.begin()

    def activate(self, name: str) -> None:
        """Attach a run's adapters to the model."""
        adapters = self._runs[name].adapters
        if self._attached is not adapters:
            adapters.attach()
            self._attached = adapters

    def train(self) -> None:
        """Train all runs, until none is left."""
        engine: TrainingEngine | None = None
        while self._runs:
            before = list(self._runs)
            for name in before:
                with self.leaving(name):
                    if self._runs[name].is_over():
                        self.results[name] = self._runs[name].finish()
                        self.stop.answer_with(SAVING)
                        self._drop(name)
            if not self._runs:
                return
            runs = dict(self._runs)
            if engine is None or list(runs) != before:
                self.activate(next(iter(runs)))
                learners = [run.session.learner for run in runs.values()]
                engine = TrainingEngine(learners, [run.adapters for run in runs.values()])
            try:
                outcomes = engine([run.step + 1 for run in runs.values()])
            except Exception as error:
                outcomes = [error] * len(runs)
            for (name, run), outcome in zip(runs.items(), outcomes, strict=True):
                with self.leaving(name):
                    if isinstance(outcome, Exception):
                        raise outcome
                    run.record_step(outcome)
            if len(self._runs) < len(runs):
                engine = None

    def _drop(self, name: str) -> None:
        """Remove a run, whose adapters may not be those on the model any more."""
        del self._runs[name]
        self._attached = None

    @contextlib.contextmanager
    def leaving(self, name: str) -> Iterator[None]:
        """An error inside is that of one run, which leaves after it has saved what it can."""
        try:
            yield
        except Exception as error:
            if name in self._runs:
                self._runs[name].fail(error)
                self._drop(name)
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


OnPackEvent = Callable[[str, events.Event], None]
"""Callback with a subject's name, empty for the whole pack, and an event of its run."""

# Besides what a loaded base is made of.
_ALIKE = (
    *sorted(SHARED - {"dataset_config", "output_dir", "overwrite_output_dir",
                      "resume_from_checkpoint"}),
    "method", "use_dora", "norm_axis", "targets", "text_encoder_targets", "train_text_encoder",
    "clip_skip", "max_token_length",
)  # fmt: skip


@dataclass(frozen=True)
class PackResult:
    """Result of a pack.

    Attributes:
        results: Of each subject that ended, or was interrupted, by its name.
        failures: Why the others left it.
        signal_number: The signal that interrupted the pack, or None.
    """

    results: dict[str, TrainResult] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    signal_number: int | None = None


@check_arguments()
def train_pack(
    configs: Mapping[str, TrainConfig | ConfigError],
    on_event: OnPackEvent | None = None,
    *,
    load: LoadBase | None = None,
) -> PackResult:
    """Train several subjects at once, each as `train` does it with its settings alone.

    A step computes the rows of all subjects in one forward and backward pass, so that it takes the
    operations of one. Each subject has its folder, draws, learning rate, clipping, checkpoints,
    samples and result. One whose photos or settings are broken, or whose numbers stop being finite,
    leaves the pack; the others continue. With ``resume_from_checkpoint: latest`` those without a
    checkpoint begin, and those with a result alone have ended.

    Args:
        configs: The settings of each subject, by its name, or why it has none
            (`dora_diffusion.config.subject_list.subject_configs`).
        on_event: Called with the subject's name and each of `dora_diffusion.training.events`.
        load: Loads the base model, as `train` takes it.

    Raises:
        ConfigError: If the settings cannot be those of a pack, before anything is loaded.
        ModelNotFoundError: If there is no such base.

    Example:
        >>> shared = TrainConfig(
        ...     max_train_steps=2, num_validation_images=0, checkpointing_steps=0,
        ...     output_dir="demo-output/doctest-pack", overwrite_output_dir=True)
        >>> subjects = [
        ...     {"instance_data_dir": "samples/bolt_mug", "instance_prompt": "a sks mug"},
        ...     {"instance_data_dir": "samples/heart_teapot", "instance_prompt": "a sks teapot"}]
        >>> from dora_diffusion.config.subject_list import subject_configs
        >>> sorted(train_pack(subject_configs(subjects, shared)).results)
        ['bolt_mug', 'heart_teapot']
    """
    usable = {name: given for name, given in configs.items() if isinstance(given, TrainConfig)}
    check_pack(usable)
    pack = _Pack(on_event or (lambda name, event: None))
    for name, given in configs.items():
        with pack.leaving(name):
            if isinstance(given, ConfigError):
                raise given
    with pack.stop, pack.stack, reading_once(), contextlib.suppress(Stopped):
        pack.open(usable, load)
        pack.train()
    return PackResult(pack.results, pack.failures, pack.stop.signal_number)


def check_pack(configs: Mapping[str, TrainConfig]) -> None:
    """Refuse settings that subjects of one pack cannot have.

    Raises:
        ConfigError: Naming the setting, and a subject.
    """
    require(bool(configs), "a pack needs a subject; none is given")
    first, *others = configs
    for name in others:
        for setting in _ALIKE:
            values = [getattr(configs[each], setting) for each in (first, name)]
            require(
                values[0] == values[1],
                f"{setting} must be the same in a pack; {first} has {shown(values[0])}, {name} "
                f"{shown(values[1])}",
                setting,
            )
    for name, config in configs.items():
        if setting := next((s for s, is_wrong in _unsupported(config).items() if is_wrong), ""):
            raise ConfigError(
                f"{setting} {shown(getattr(config, setting))} of {name} is not possible in a pack; "
                "leave it out, or train that subject by itself",
                setting,
            )


def _unsupported(config: TrainConfig) -> dict[str, bool]:
    """Settings that a pack does not have, and whether they are set so."""
    encodes = config.train_text_encoder
    return {
        "method": config.is_full,
        "teach": config.is_slider,
        "parametrization": config.parametrization != "low-rank",
        "init": config.init == "pissa",
        "lora_dropout": config.lora_dropout > 0,
        "train_text_encoder_ti": config.train_text_encoder_ti,
        "text_encoder_targets": encodes and "token-embedding" in config.text_encoder_targets,
        # A caption in chunks is several rows of a text encoder, and a dropped one none.
        "max_token_length": encodes and config.max_token_length != 75,
        "clip_skip": encodes
        and config.clip_skip > 0
        and any(subject.caption_dropout for subject in config.subjects),
        "compile": config.compile,
        "report_to": config.report_to is not None,
        "push_to_hub": config.push_to_hub,
        "mixed_precision": precision_of(config.mixed_precision) == "fp16",
    }


class _Pack(Loop):
    """The subjects of a pack: one that fails leaves it, and the others continue."""

    def __init__(self, on_event: OnPackEvent) -> None:
        super().__init__(StopRequest())
        self.failures: dict[str, Exception] = {}
        self.stack = contextlib.ExitStack()
        self._show = on_event

    def open(self, configs: Mapping[str, TrainConfig], load: LoadBase | None = None) -> None:
        """Load the base, and make every subject ready for its next step."""
        ready: dict[str, tuple[TrainConfig, list[Subject]]] = {}
        for name, config in configs.items():
            with self.leaving(name):
                if made := self._ready(name, config):
                    ready[name] = made
        if not ready:
            return
        config = next(iter(ready.values()))[0]
        accelerator = make_accelerator(config)
        require(
            accelerator.num_processes == 1,
            f"a pack trains in one process, and there are {accelerator.num_processes}; start it "
            "without accelerate launch, or each subject by itself",
        )
        model, device = config.pretrained_model_name_or_path, str(accelerator.device)
        self._show("", events.ModelLoading(model, device, config.mixed_precision))
        base = load_base(config, accelerator, load)
        for name, (own, subjects) in ready.items():
            try:
                with self.leaving(name):
                    self.begin(name, own, subjects, accelerator, partial(self._show, name), base)
            finally:
                AdapterSet.of(*base.adaptable().values()).detach()
                self._attached = None

    def _ready(self, name: str, config: TrainConfig) -> tuple[TrainConfig, list[Subject]] | None:
        """A subject's settings, checked as far as is possible without the base; None: it ended."""
        folder = Path(config.output_dir)
        if config.resume_from_checkpoint == "latest" and not checkpoints_in(folder):
            adapter = next(folder.glob("*.safetensors"), None)
            if has_learned_nothing(folder):
                raise TrainingError(
                    f"{folder} holds the result of a run that has learned nothing; start it over "
                    "with --overwrite_output_dir, and other settings"
                )
            if adapter is not None:
                steps = config.max_train_steps or 0
                self.results[name] = TrainResult(folder, adapter, steps, steps, None, {})
                return None
            config = replace(config, resume_from_checkpoint=None)
        own, subjects = checked(config)
        list_subjects(subjects)
        self.stack.enter_context(output_folder(own))
        return own, subjects

    def left(self, name: str, error: Exception) -> None:
        """Report that a subject left."""
        self.failures[name] = error
        self._show(name, events.SubjectLeft(str(error)))
