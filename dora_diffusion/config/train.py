"""All settings of a training run, validated on construction.

The fields of `TrainConfig` are the flags of ``train_dreambooth_dora.py`` and the keys of its YAML
config files; its base classes are the groups of settings, in the order of ``--help``. Flags of
Diffusers' scripts keep their names and meaning; `dora_diffusion.config.flag_map` has answers to
flags that are missing here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial, reduce
from itertools import chain, islice
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dora_diffusion.config import learning, run, subject
from dora_diffusion.config.adapter import AdapterConfig
from dora_diffusion.config.base import BaseModel, StorageSettings, require_tile_size
from dora_diffusion.config.exclusions import exclusions
from dora_diffusion.config.families import DEFAULT_FAMILY, DENOISERS
from dora_diffusion.config.features.adalora import AdaLoraSettings
from dora_diffusion.config.features.average import EmaSettings, ScheduleFreeSettings
from dora_diffusion.config.features.compile import CompileSettings
from dora_diffusion.config.features.feature import Description, Feature
from dora_diffusion.config.features.full import FullSettings
from dora_diffusion.config.features.held_out import HeldOutSettings
from dora_diffusion.config.features.prior import (
    ImageFreeSettings,
    PriorSettings,
    UnmaskedSettings,
)
from dora_diffusion.config.features.slider import SliderSettings
from dora_diffusion.config.features.twin import AssistantSettings, SampleModelSettings
from dora_diffusion.config.features.words import WordSettings
from dora_diffusion.config.fields import (
    Condition,
    ConfigError,
    Setting,
    in_order,
    python_number,
    require,
    require_token_length,
    shown,
)
from dora_diffusion.config.file import PATHS
from dora_diffusion.config.flag_map import find_training_setting, without_removed
from dora_diffusion.config.images import (
    PIXELS,
    SAFE_STEP,
    SamplePrompt,
    near_side,
    parse_prompt,
    read_prompts,
)
from dora_diffusion.config.problems import Problems, naming_entry, read_values
from dora_diffusion.config.wording import prefixed_caption

if TYPE_CHECKING:
    # In a frozen class, mypy gives inherited fields the types of the arguments of `__init__`. The
    # fields are read-only in their own classes.
    from dataclasses import dataclass as frozen_dataclass
else:
    frozen_dataclass = partial(dataclasses.dataclass, frozen=True)


@frozen_dataclass(kw_only=True)
class TrainConfig(  # type: ignore[misc]
    subject.ModelSettings,
    StorageSettings,
    subject.SubjectSettings,
    WordSettings,
    SliderSettings,
    subject.ImageSettings,
    PriorSettings,
    ImageFreeSettings,
    UnmaskedSettings,
    learning.AdapterSettings,
    FullSettings,
    AssistantSettings,
    AdaLoraSettings,
    learning.LengthSettings,
    learning.OptimizerSettings,
    EmaSettings,
    ScheduleFreeSettings,
    learning.LossSettings,
    run.DeviceSettings,
    CompileSettings,
    run.SampleSettings,
    SampleModelSettings,
    HeldOutSettings,
    run.OutputSettings,
):
    """All settings of one DreamBooth run.

    Example:
        >>> TrainConfig(instance_data_dir="photos", instance_prompt="a photo of a sks dog").rank
        8

    Raises:
        ConfigError: If a value cannot work, or two values contradict each other.
    """

    files: ClassVar[Mapping[Path, str]] = {}
    """Texts of the files of features from outside (`with_features`)."""
    classes: ClassVar[tuple[str, ...]] = ()
    """Names of the classes of features from outside."""

    def __post_init__(self) -> None:
        self._check_values()
        if self.feature and not (self.files or self.classes):
            raise ConfigError(
                f"feature {self.feature[0]} is code, and runs only where it is given: in a command "
                "as 'dora-diffusion train --feature FILE', in Python as with_features(FILE)",
                "feature",
            )
        if self.dataset_config:
            from dora_diffusion.config.dataset_file import checked_entries

            entries = checked_entries(
                self.dataset_config, settings_by_name(), self.train_batch_size
            )
            object.__setattr__(self, "dataset_config", entries)
            problems = Problems()
            for index in range(len(entries)):
                with problems.collect(), naming_entry(index):
                    self.of_entry(index)
            problems.raise_all()
        if self.method is None:
            object.__setattr__(self, "method", self.default("method", "dora"))
            for name in ("features", "subjects"):  # They depend on the method.
                vars(self).pop(name)
        problems = Problems()
        # The first problem of each feature: its others may follow from it.
        of_features = (islice(one.problems(self), 1) for one in self.features)
        for name, message in chain(exclusions(self, "run"), *of_features):
            problems.add(ConfigError(message, name))
        problems.raise_all()
        adapters = map(self.adapter, ("unet", "text_encoder"))
        denoiser, _ = adapters  # They check their own values.
        if self.init_adapter and self.trains_adapters:
            denoiser.check_start()

    def _check_values(self) -> None:
        """Check each value on its own."""
        problems = Problems()
        for setting in settings(type(self)):
            value = python_number(getattr(self, setting.name))
            # A path is text, as in a YAML file.
            value = fspath(value) if isinstance(value, PathLike) else value
            object.__setattr__(self, setting.name, value)
            with problems.collect():
                setting.check(value)
                if setting.one_line:
                    value = [" ".join(text.split()) for text in value]
                    object.__setattr__(self, setting.name, value)
        problems.raise_all()
        require_token_length(self.max_token_length)
        require_tile_size(self.vae_tile_size)
        side = self.resolution or PIXELS
        require(
            side % PIXELS == 0,
            f"resolution is {side}; it must be a multiple of {PIXELS}, such as "
            f"{near_side(side, SAFE_STEP)}",
            "resolution",
        )
        for prompt in self.validation_prompt:
            parse_prompt(prompt)

    def of_entry(self, index: int) -> TrainConfig:
        """Settings of the run, overridden by an entry of `dataset_config`."""
        defaults = {s.name: s.default for s in settings(type(self)) if s.of_run}
        return dataclasses.replace(self, **{**defaults, **self.dataset_config[index]})

    @cached_property
    def subjects(self) -> list[TrainConfig]:
        """Settings of each subject: one for each entry, or the run's own without entries."""
        indices = range(len(self.dataset_config))
        return [self.of_entry(index) for index in indices] or [self]

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        """Optional features that are on, in the order in which they act."""
        return tuple(one for one in features_of(type(self)) if one.is_on(self))

    @cached_property
    def has_photos(self) -> bool:
        """True if the run learns from photos."""
        return learns_from_photos(vars(self))

    @property
    def trains_adapters(self) -> bool:
        """True if the run trains adapters, not weights of the model itself."""
        return all(one.trains_adapters for one in self.features)

    def uses(self, name: str) -> bool:
        """Return whether a setting has an effect, for any subject of the run."""
        setting = settings_by_name(type(self))[name]
        return any(setting.inactive_reason(subject) is None for subject in self.subjects)

    def default(self, name: str, usual: Any) -> Any:
        """Return the default of a setting by the features that are on, or else the usual one."""
        values = (one.defaults(self) for one in self.features)
        return next((of_one[name] for of_one in values if name in of_one), usual)

    def describe(self) -> Description:
        """Describe what the run makes."""
        run = Description(encodes_in_steps=self.train_text_encoder)
        return reduce(lambda run, one: one.describe(self, run), self.features, run)

    def adapter(self, component: str) -> AdapterConfig:
        """Return the adapter of a component; text encoders have layers of one kind."""
        linear_only = component not in DENOISERS
        targets = self.text_encoder_targets if linear_only else self.targets
        is_vera = self.parametrization == "vera"
        return AdapterConfig(
            targets=tuple(targets),
            rank=self.vera_rank if is_vera else self.rank,
            alpha=self.lora_alpha,
            conv_rank=None if linear_only or is_vera else self.conv_rank,
            conv_alpha=None if linear_only else self.conv_alpha,
            rslora=self.rslora,
            use_dora=self.method_name == "dora",
            norm_axis=self.norm_axis,
            dropout=self.lora_dropout,
            init=self.init,
            parametrization=self.parametrization,
            projection_seed=self.seed,
            rank_pattern={} if is_vera else self.rank_pattern,
            alpha_pattern={} if is_vera else self.alpha_pattern,
        )

    @property
    def method_name(self) -> str:
        """The method, with ``use_dora`` taken into account."""
        return "lora" if self.method == "dora" and not self.use_dora else self.method

    @property
    def base_model(self) -> BaseModel:
        """The base model with its loading options."""
        return BaseModel.of_settings(vars(self))

    @property
    def sample_base(self) -> BaseModel | None:
        """The model of samples, stored as the base model is; None: the base model itself."""
        return self.base_model.twin(self.sample_model) if self.sample_model else None

    @property
    def unet_lr(self) -> float:
        """Learning rate of the denoiser."""
        rate: float = self.default("learning_rate", DEFAULT_FAMILY.default_rate)
        return rate if self.learning_rate is None else self.learning_rate

    @property
    def is_prodigy(self) -> bool:
        """True if the optimizer estimates the learning rate."""
        return self.optimizer in learning.PRODIGIES

    @property
    def lr_schedule(self) -> str:
        """Learning-rate schedule; Diffusers' plain ``constant`` would ignore the warm-up."""
        with_warmup = self.lr_scheduler == "constant" and self.lr_warmup_steps > 0
        return "constant_with_warmup" if with_warmup else self.lr_scheduler

    @property
    def prompts(self) -> list[SamplePrompt]:
        """Prompts of sample images: the validation prompts, else the training prompts."""
        lines = self.validation_prompt or taught_prompts(self)
        return [parse_prompt(line) for line in lines if line]

    def with_sample_prompts(self) -> TrainConfig:
        """Return the settings with the lines of ``sample_prompts`` added to the validation prompts.

        Raises:
            ConfigError: If the file cannot be read, or a line is not valid.
        """
        if not self.sample_prompts or not self.num_validation_images:
            return self
        lines = [*self.validation_prompt, *read_prompts(self.sample_prompts)]
        return dataclasses.replace(self, validation_prompt=lines, sample_prompts=None)

    def to_dict(self) -> dict[str, Any]:
        """Settings as plain values, as in a YAML file."""
        return {s.name: copy.deepcopy(getattr(self, s.name)) for s in settings(type(self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build a config from plain values, with the features from outside that are in use.

        Raises:
            ConfigError: If a key is not a setting, or a value has the wrong type.
        """
        require(PATHS not in values, f"{PATHS} is of a file; read_config_file resolves its paths")
        kind, find = current(), partial(find_training_setting, known=settings_by_name())
        config: TrainConfig = kind(**read_values(without_removed(values), find))
        return config


def taught_prompts(config: TrainConfig) -> list[str]:
    """Return the unique prompts that a run teaches: the instance prompts of the subjects."""
    prompts = config.describe().prompts
    prompts = list(map(prefixed_prompt, config.subjects)) if prompts is None else prompts
    return list(dict.fromkeys(filter(None, prompts)))


def photo_folders(config: TrainConfig) -> dict[str, str]:
    """Return the folders of a subject's photos, by their settings."""
    names = [setting.name for setting in settings() if setting.has_photos]
    return {name: folder for name in names if (folder := getattr(config, name))}


def prefixed_prompt(config: TrainConfig) -> str:
    """Instance prompt as a caption, with its prefix."""
    prefix, prompt = config.caption_prefix, config.instance_prompt or ""
    return prefixed_caption(prefix, prompt) if prompt and prefix else prompt


@dataclass(frozen=True)
class _Used:
    """Conditions of a setting, for a feature that is on and uses it its own."""

    name: str
    features: tuple[Feature, ...]
    needs: tuple[Condition, ...]

    def __call__(self, config: Any) -> str | None:
        """Return why the setting has no effect; None if it has one."""
        used = ((one, one.adds[self.name].needs) for one in self.features)
        on = [need for one, need in used if need and one.is_on(config)]
        return next(filter(None, (need(config) for need in on or self.needs)), None)


def _without_photos(config: Any) -> str | None:
    for one in features_of(type(config)):
        if not one.has_photos and one.on(config) is None:
            name = one.on.setting
            return f"{name} is {shown(getattr(config, name))}, which has no images"
    return None


def learns_from_photos(values: Mapping[str, Any]) -> bool:
    """Return whether a run with these values of settings learns from photos."""
    switches = [one.on for one in features_of(TrainConfig) if not one.has_photos]
    return not any(values.get(on.setting) in on.values for on in switches)


def features_of(kind: Any) -> tuple[Feature, ...]:
    """All optional features, on or off, in the order in which they act."""
    groups = (vars(group) for group in kind.__mro__)
    return tuple(group["belongs_to"] for group in groups if "belongs_to" in group)


@lru_cache
def _settings(kind: Any) -> dict[str, Setting]:
    described = [
        Setting.from_field(source, group=group.heading, **getattr(group, "common", {}))
        for group in kind.__mro__
        if "heading" in vars(group)
        for source in dataclasses.fields(group)
    ]
    features = features_of(kind)
    return {one.name: _extended(one, features) for one in in_order(described)}


_KIND = ContextVar[Any]("kind", default=TrainConfig)


def current() -> Any:
    """Return `TrainConfig`, or its subclass with the features from outside that are in use."""
    return _KIND.get()


@contextmanager
def using(kind: Any) -> Iterator[None]:
    """Use a subclass of `TrainConfig`, and its settings, inside the block."""
    token = _KIND.set(kind)
    try:
        yield
    finally:
        _KIND.reset(token)


def settings(kind: Any = None) -> tuple[Setting, ...]:
    """All settings, in the order of the help; default: of the `current` class."""
    return tuple(_settings(kind or current()).values())


def settings_by_name(kind: Any = None) -> Mapping[str, Setting]:
    """All settings by name, as `settings`."""
    return _settings(kind or current())


def run_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run's file that this package has, to read of a run alone."""
    if not values.get("feature"):
        return dict(values)
    known = settings_by_name()
    return {name: value for name, value in values.items() if name in known and name != "feature"}


def _extended(setting: Setting, features: Sequence[Feature]) -> Setting:
    """Return a setting with what features add to it, and conditions for their use of it."""
    name, help_, derived, choices = setting.name, setting.help, setting.derived, setting.choices
    for added in (one.adds[name] for one in features if name in one.adds):
        help_ = help_.removesuffix(".") + f"{added.help}." if added.help else help_
        derived += added.derived
        choices = (*choices, *added.choices) if choices else None
    users = tuple(one for one in features if name in one.adds and one.adds[name].needs)
    needs = (_Used(name, users, setting.needs),) if users else setting.needs
    needs = (_without_photos, *needs) if setting.of_photos else needs
    return dataclasses.replace(setting, help=help_, derived=derived, choices=choices, needs=needs)
