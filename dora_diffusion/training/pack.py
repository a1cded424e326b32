"""Packs: several runs that train at once on one model, each with its own adapter and folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dora_diffusion.adapters.inject import AdapterSet
from dora_diffusion.adapters.layers import adapted_layers
from dora_diffusion.adapters.targets import require_rows
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.exclusions import exclusions
from dora_diffusion.config.fields import require, shown
from dora_diffusion.config.subject_list import SHARED
from dora_diffusion.config.train import using
from dora_diffusion.data.images import reading_once
from dora_diffusion.models.components import Components
from dora_diffusion.models.precision import precision_of
from dora_diffusion.training import events
from dora_diffusion.training.features.outside import named
from dora_diffusion.training.folder import RunFolder, TrainResult
from dora_diffusion.training.inputs.base import LoadBase, load_base
from dora_diffusion.training.inputs.plan import RunPlan, plan_run
from dora_diffusion.training.metrics import TrainingError
from dora_diffusion.training.pack_step import PackStep
from dora_diffusion.training.processes import make_accelerator
from dora_diffusion.training.recipe import assemble
from dora_diffusion.training.results.checkpoint import checkpoints_in
from dora_diffusion.training.results.files import SAVING
from dora_diffusion.training.results.folders import output_folder
from dora_diffusion.training.results.record import has_learned_nothing
from dora_diffusion.training.signals import Stopped, StopRequest

OnPackEvent = Callable[[str, events.Event], None]
"""Callback with a subject's name, empty for the whole pack, and an event of its run."""

# Settings that all subjects must share, in addition to the base model's.
_ALIKE = (
    *sorted(SHARED - {"dataset_config", "feature", "output_dir", "overwrite_output_dir",
                      "resume_from_checkpoint"}),
    "method", "use_dora", "norm_axis", "targets", "text_encoder_targets", "train_text_encoder",
    "clip_skip", "max_token_length",
)  # fmt: skip


@dataclass(frozen=True)
class PackResult:
    """Result of a pack.

    Attributes:
        results: Results of completed and interrupted runs, by name of the subject.
        failures: Errors of failed runs, by name of the subject.
        signal_number: Signal that interrupted the pack, or None.
    """

    results: dict[str, TrainResult] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    signal_number: int | None = None


def train_pack(
    configs: Mapping[str, TrainConfig | ConfigError],
    on_event: OnPackEvent | None = None,
    *,
    load: LoadBase | None = None,
) -> PackResult:
    """Train several subjects at once, each with the same result as `train` with its settings.

    A step computes the rows of all subjects in one forward and backward pass, with as many kernel
    launches as for one subject. Each subject has its own folder, random draws, learning rate,
    clipping, checkpoints, samples and result. A subject with invalid photos, settings or losses
    leaves the pack; the others continue. With ``resume_from_checkpoint: latest`` a subject without
    a checkpoint starts from the beginning, and a subject that has only a result is complete.

    Args:
        configs: Settings of each subject by name, or the error of invalid settings
            (`dora_diffusion.config.subject_list.subject_configs`).
        on_event: Called with the name of the subject and each event
            (`dora_diffusion.training.events`).
        load: Loads the base model, as in `train`.

    Raises:
        ConfigError: If a pack cannot have these settings. Nothing is loaded then.
        ModelNotFoundError: If the base model does not exist.

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
    usable = {name: config for name, config in configs.items() if isinstance(config, TrainConfig)}
    check_pack(usable)
    kind = type(next(iter(usable.values())))
    pack = _Pack(on_event or (lambda name, event: None), kind)
    for name, config in configs.items():
        with pack.leaving(name):
            if isinstance(config, ConfigError):
                raise config
    with using(kind), pack.stop, pack.folders, reading_once(), contextlib.suppress(Stopped):
        pack.open(usable, load)
        pack.train()
    return PackResult(pack.results, pack.failures, pack.stop.signal_number)


def check_pack(configs: Mapping[str, TrainConfig]) -> None:
    """Check that a pack can have these settings.

    Raises:
        ConfigError: If a setting is not supported, or differs between subjects.
    """
    require(bool(configs), "a pack needs a subject; none is given")
    first, *rest = configs
    for name in rest:
        require(
            type(configs[first]) is type(configs[name]),
            f"{first} and {name} have other features from outside; make all settings of a pack "
            "with one with_features()",
            "feature",
        )
        for setting in _ALIKE:
            values = [getattr(configs[subject], setting) for subject in (first, name)]
            require(
                values[0] == values[1],
                f"{setting} must be the same in a pack; {first} has {shown(values[0])}, {name} "
                f"{shown(values[1])}",
                setting,
            )
    for name, config in configs.items():
        excluded = [setting for setting, _ in exclusions(config, "pack")]
        excluded += ["mixed_precision"] * (precision_of(config.mixed_precision) == "fp16")
        for setting in excluded:
            raise ConfigError(
                f"{setting} {shown(getattr(config, setting))} of {name} is not possible in a pack; "
                "remove it, or train that subject alone",
                setting,
            )


class _Pack:
    """Runs of a pack. A run that fails leaves the pack, and the others continue.

    Attributes:
        results: Results of completed and interrupted runs.
        failures: Errors of failed runs.
        stop: Signals that stop all runs.
        folders: Locks of the output folders.
    """

    def __init__(self, on_event: OnPackEvent, kind: type[TrainConfig]) -> None:
        self.results: dict[str, TrainResult] = {}
        self.failures: dict[str, Exception] = {}
        self.stop, self.folders = StopRequest(), contextlib.ExitStack()
        self._show, self._kind = on_event, kind
        self._runs: dict[str, RunFolder] = {}
        self._attached: AdapterSet | None = None

    def open(self, configs: Mapping[str, TrainConfig], load: LoadBase | None = None) -> None:
        """Load the base, and prepare the first step of every subject."""
        ready: dict[str, RunPlan] = {}
        for name, config in configs.items():
            with self.leaving(name):
                if prepared := self._prepared(name, config):
                    ready[name] = prepared
        if not ready:
            return
        config = next(iter(ready.values())).config
        accelerator = make_accelerator(config)
        require(
            accelerator.num_processes == 1,
            f"a pack trains in one process, but there are {accelerator.num_processes}; start it "
            "without accelerate launch, or train each subject alone",
        )
        model, device = config.pretrained_model_name_or_path, str(accelerator.device)
        self._show("", events.ModelLoading(model, device, config.mixed_precision))
        base = load_base(config, accelerator, load)
        for name, plan in ready.items():
            try:
                with self.leaving(name):
                    self._begin(name, plan, accelerator, base)
            finally:
                AdapterSet.of(*base.adaptable().values()).detach()
                self._attached = None

    def _prepared(self, name: str, config: TrainConfig) -> RunPlan | None:
        """Check a subject's settings without the base model. Returns None if the run is over."""
        folder = Path(config.output_dir)
        if config.resume_from_checkpoint == "latest" and not checkpoints_in(folder):
            adapter = next(folder.glob("*.safetensors"), None)
            if has_learned_nothing(folder):
                raise TrainingError(
                    f"{folder} holds the result of a run that has learned nothing; start over with "
                    "other settings and --overwrite_output_dir"
                )
            if adapter is not None:
                steps = config.max_train_steps or 0
                self.results[name] = TrainResult(folder, adapter, steps, steps, None, {})
                return None
            config = replace(config, resume_from_checkpoint=None)
        plan = plan_run(config)
        self.folders.enter_context(output_folder(config))
        return plan

    def _begin(self, name: str, plan: RunPlan, accelerator: Any, base: Components) -> None:
        """Assemble a run and begin it. Its adapters stay attached to the model."""
        show = partial(self._show, name)
        run = assemble(plan, accelerator, show, base=base)
        for model in run.weights.modules.values():
            require_rows([path for path, _ in adapted_layers(model)])
        run.activate = partial(self._attach, run.step.adapters)
        folder = RunFolder(run, show, self.stop)
        self._runs[name], self._attached = folder, run.step.adapters
        folder.begin()

    def _attach(self, adapters: AdapterSet) -> None:
        """Attach a run's adapters to the model."""
        if self._attached is not adapters:
            adapters.attach()
            self._attached = adapters

    def train(self) -> None:
        """Train until every run is complete or has failed."""
        while True:
            self._finish_runs()
            if not self._runs:
                return
            runs = dict(self._runs)
            next(iter(runs.values())).run.activate()
            step = PackStep([folder.run.step for folder in runs.values()])
            while list(self._runs) == list(runs) and not self._step(step, runs):
                self._finish_runs()

    def _finish_runs(self) -> None:
        """Write the results of completed runs."""
        for name, folder in list(self._runs.items()):
            with self.leaving(name):
                if folder.is_over:
                    self.results[name] = folder.finish()
                    self.stop.answer_with(SAVING)
                    self._drop(name)

    def _step(self, step: PackStep, runs: Mapping[str, RunFolder]) -> bool:
        """Take a step of all runs. Returns whether a run has left the pack."""
        try:
            outcomes = step([folder.steps + 1 for folder in runs.values()])
        except Exception as error:
            outcomes = [error] * len(runs)
        for (name, folder), outcome in zip(runs.items(), outcomes, strict=True):
            with self.leaving(name):
                if isinstance(outcome, Exception):
                    raise outcome
                folder.record(outcome)
        return len(self._runs) < len(runs)

    def _drop(self, name: str) -> None:
        """Remove a run. Its adapters may no longer be attached."""
        del self._runs[name]
        self._attached = None

    @contextlib.contextmanager
    def leaving(self, name: str) -> Iterator[None]:
        """Context in which an error ends one run, after saving a checkpoint if possible."""
        try:
            yield
        except Exception as error:
            if name in self._runs:
                self._runs[name].fail(error)
                self._drop(name)
            self.failures[name] = error = named(error, self._kind)
            self._show(name, events.SubjectLeft(str(error)))
