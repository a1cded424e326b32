"""Packs: several subjects train at once on one base, each an adapter of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dora_diffusion.adapters.inject import detach_adapters
from dora_diffusion.config import ConfigError, TrainConfig
from dora_diffusion.config.fields import require, shown
from dora_diffusion.config.subject_list import SHARED
from dora_diffusion.data.images import reading_once
from dora_diffusion.models.components import Components
from dora_diffusion.models.precision import precision_of
from dora_diffusion.training import events
from dora_diffusion.training.engine.accelerator import make_accelerator
from dora_diffusion.training.inputs.dataset import list_subjects
from dora_diffusion.training.inputs.subject import Subject
from dora_diffusion.training.loop import Loop, checked
from dora_diffusion.training.results.checkpoint import checkpoints_in
from dora_diffusion.training.results.folders import output_folder
from dora_diffusion.training.results.resume import start_run
from dora_diffusion.training.run import Run, TrainResult
from dora_diffusion.training.session import LoadBase, load_base, open_session
from dora_diffusion.training.signals import Stopped, StopRequest

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
        "parametrization": config.parametrization != "low-rank",
        "init": config.init == "pissa",
        "lora_dropout": config.lora_dropout > 0,
        "optimizer": config.optimizer_name != "adamw",
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
                    self._begin(name, own, subjects, accelerator, base)
            finally:
                detach_adapters(*base.adaptable().values())
                self._attached = None

    def _ready(self, name: str, config: TrainConfig) -> tuple[TrainConfig, list[Subject]] | None:
        """A subject's settings, checked as far as is possible without the base; None: it ended."""
        folder = Path(config.output_dir)
        if config.resume_from_checkpoint == "latest" and not checkpoints_in(folder):
            adapter = next(folder.glob("*.safetensors"), None)
            if adapter is not None:
                steps = config.max_train_steps or 0
                self.results[name] = TrainResult(folder, adapter, steps, steps, None, {})
                return None
            config = replace(config, resume_from_checkpoint=None)
        own, subjects = checked(config)
        list_subjects(subjects)
        self.stack.enter_context(output_folder(own))
        return own, subjects

    def _begin(
        self, name: str, config: TrainConfig, subjects: list[Subject], accelerator: Any,
        base: Components,
    ) -> None:  # fmt: skip
        """Open a subject's run, whose adapters are on the base afterwards."""
        show = partial(self._show, name)
        session = open_session(config, subjects, accelerator, show, base)
        session = replace(session, activate=partial(self.activate, name))
        folder = Path(config.output_dir)
        self.begin(name, Run(*start_run(session, folder), folder, show, self.stop))

    def left(self, name: str, error: Exception) -> None:
        """Report that a subject left."""
        self.failures[name] = error
        self._show(name, events.SubjectLeft(str(error)))
