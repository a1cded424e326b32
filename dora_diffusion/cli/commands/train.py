"""``dora-diffusion train``, with the fields of `TrainConfig` as its flags."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.cli.commands.parser import CONFIG_HELP, Parser, add_flags
from dora_diffusion.cli.console.errors import explain
from dora_diffusion.cli.console.training import (
    TrainProgress,
    next_steps,
    training_summary,
)
from dora_diffusion.config import (
    PRESETS,
    ConfigError,
    TrainConfig,
    read_config_file,
    read_config_lines,
    settings,
    without_effect,
)
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.command import CommandSettings
from dora_diffusion.config.derived import overridden
from dora_diffusion.config.families import DEFAULT_FAMILY
from dora_diffusion.config.fields import Setting, require_choice
from dora_diffusion.config.file import line_prefix
from dora_diffusion.config.flag_map import (
    DIFFUSERS_FLAGS,
    find_training_setting,
    meant_by,
    notes,
    refusal,
)
from dora_diffusion.config.foreign import ForeignFileError
from dora_diffusion.config.images import SAMPLES
from dora_diffusion.config.presets import preset_advice, preset_settings
from dora_diffusion.config.problems import Problems, read_values
from dora_diffusion.config.train import settings_by_name
from dora_diffusion.config.wording import quoted
from dora_diffusion.models.locate import (
    is_embedded,
    known_family,
    known_info,
    sampling_values,
)

if TYPE_CHECKING:
    from dora_diffusion.training.recipe import TrainResult

# The flags that --help shows.
FIRST = (
    "pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "token",
    "dataset_config", "resolution", "masked_loss", "with_prior_preservation",
    "method", "init_adapter", "targets", "train_text_encoder", "rank",
    "max_train_steps", "train_batch_size", "learning_rate", "gradient_checkpointing",
    "validation_prompt", "output_dir", "resume_from_checkpoint",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainSettings(CommandSettings):
    """Settings of ``train``: the parsed arguments, read as a `TrainConfig` by `perform`."""

    args: argparse.Namespace

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Add the flags of settings, and of several subjects at once."""
        parser.usage = "%(prog)s [--config FILE] [--SETTING VALUE ...]"
        parser.split_help(("config", "pack", "debug", *FIRST))
        parser.epilog = (
            f"These are {len(FIRST)} of {len(settings())} settings; --help-all shows all."
        )
        parser.add_argument(
            "--pack",
            metavar="PATH",
            help="Train several subjects at once, each as a separate adapter in OUTPUT_DIR/NAME. "
            "PATH is a dataset file (see dataset_config) whose entries may have a name and most "
            "settings of a run, or a folder with a sub-folder of photos per subject. Other flags "
            "apply to all subjects. Default: none.",
        )
        add_settings(parser)

    @classmethod
    def of_arguments(cls, args: argparse.Namespace) -> TrainSettings:
        """Keep the arguments unread; `train_config` reads them."""
        return cls(args=args)

    def perform(self) -> int:
        """Train, with a progress bar. Returns the exit code."""
        args, config = self.args, train_config(self.args)
        configs: Mapping[str, TrainConfig | ConfigError] = {}
        if args.pack:
            from dora_diffusion.config.subject_list import subject_configs

            configs = subject_configs(args.pack, config)
        if args.dry_run:
            return print_training_summary(configs or {"": config})
        warn_of_toy_model(config, args)
        if configs:
            return _train_pack(configs)
        from dora_diffusion.training.inputs.subject import example_prompt
        from dora_diffusion.training.recipe import train

        progress = TrainProgress()
        try:
            result = train(config, progress)
        finally:
            progress.close()
        if result.signal_number is not None:
            if progress.started:
                print(stopped_line(result))
            return 128 + result.signal_number
        if written := result.adapter or result.model:
            print(f"done: {written}")
            print(
                trigger_line(progress.triggers[""], example_prompt(config), config.describe().hint)
            )
            print("\n".join(next_steps(config, written)))
            if result.kept is not None:
                print(f"the file keeps {result.kept:.1%} of what training changed")
            if result.published:
                print(result.published)
        return 0


def add_settings(parser: Parser) -> None:
    """Add ``--config``, one flag per setting, and further flags of Diffusers' scripts."""
    parser.refusal = refusal
    parser.meant_by = partial(meant_by, known=settings_by_name())
    parser.add_argument("--config", help=CONFIG_HELP)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="Settings to start from; the file's and flags given here take precedence. "
        + " ".join(
            f"{name}: {one.about} {one.measured}"
            + (f" It sets --token '{one.settings['token']}'." if "token" in one.settings else "")
            for name, one in PRESETS.items()
        )
        + " Default: none.",
    )
    parser.add_argument(
        "--memory",
        metavar="GIB",
        help="Choose precision, gradient checkpointing, optimizer, quantised base and resolution "
        "to fit this memory, unless they are given: GiB of a GPU, or auto for the free memory of "
        "this machine. By counted memory, not yet measured on GPUs. Default: none.",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="List the training images with their captions, and exit before the model is loaded. "
        "Default: off.",
    )
    add_flags(parser, settings())
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--config_file", dest="config", **hidden)  # as in sd-scripts
    for name, answer in DIFFUSERS_FLAGS.items():
        if answer.status == "renamed":
            parser.add_argument(f"--{name}", dest=answer.setting, **hidden)
        elif answer.status == "ignored":
            parser.add_argument(f"--{name}", nargs="?", **hidden)


def print_training_summary(configs: Mapping[str, TrainConfig | ConfigError]) -> int:
    """Print the training images of each subject. Returns 1 if one of several is not valid."""
    failed = 0
    for name, config in configs.items():
        try:
            if isinstance(config, ConfigError):
                raise config
            print(f"{name}:\n{training_summary(config)}" if name else training_summary(config))
        except (ValueError, OSError) as error:
            if not name:
                raise
            failed += 1
            print(f"{name}: {explain(error)[1] or type(error).__name__}")
    return int(bool(failed))


def _train_pack(configs: Mapping[str, TrainConfig | ConfigError]) -> int:
    """Train several subjects at once. Returns 1 if one of them failed."""
    from dora_diffusion.training.pack import train_pack

    progress = TrainProgress()
    try:
        pack = train_pack(configs, lambda name, event: progress(event, name))
    finally:
        progress.close()
    for name, result in pack.results.items():
        if result.interrupted:
            print(f"{name}: {stopped_line(result)}")
        elif result.adapter:
            trigger = progress.triggers.get(name, "")
            print(f"{name}: {result.adapter}" + (f" ({trigger})" if trigger else ""))
    for name, error in pack.failures.items():
        print(f"{name} failed: {error}")
    if pack.signal_number is not None:
        return 128 + pack.signal_number
    return 1 if pack.failures else 0


def trigger_line(trigger: str, prompt: str, hint: str = "") -> str:
    """Return a line on prompts: with the trigger words, or a caption if there are none."""
    from dora_diffusion.formats.adapter.metadata import split_triggers

    if triggers := split_triggers(trigger):
        which = "the subject" if len(triggers) == 1 else "that subject"
        return f"write {' or '.join(map(repr, triggers))} in a prompt to get {which}"
    such_as = f", such as {quoted(prompt)}" if prompt else ""
    return f"{hint or 'it has no trigger word: write prompts like its captions'}{such_as}"


def stopped_line(result: TrainResult) -> str:
    """Return a line with the last step of an interrupted run, and how to resume it."""
    from dora_diffusion.training.results.checkpoint import step_of

    where = f"stopped at step {result.steps} of {result.total_steps}"
    if result.checkpoint is None:
        return f"{where}; no checkpoint was saved"
    if step_of(result.checkpoint) < result.steps:
        return f"{where}; --resume_from_checkpoint latest resumes from {result.checkpoint.name}"
    return f"{where}, checkpoint saved; resume with --resume_from_checkpoint latest"


def warn_of_toy_model(config: TrainConfig, args: argparse.Namespace) -> None:
    """Warn if no base model is given, since the toy model is trained then."""
    names = {*vars(args), *(read_config_file(args.config) if args.config else ())}
    if "pretrained_model_name_or_path" not in names:
        warnings.warn(
            f"NO BASE MODEL WAS GIVEN: {config.pretrained_model_name_or_path} is trained, a toy "
            "model of 64 pixels that knows only its own drawn world and cannot learn a real "
            "photo; name yours with --pretrained_model_name_or_path",
            stacklevel=1,
        )


def train_config(args: argparse.Namespace) -> TrainConfig:
    """Return the settings of a command line: its flags, else its file's settings.

    Raises:
        ConfigError: If the file or a value is not valid; names the line of a file's setting.

    Warns:
        UserWarning: If a flag has no effect, or a setting has another meaning in other trainers.
    """
    known, problems = settings_by_name(), Problems()
    values, lines = read_config_lines(args.config) if args.config else ({}, {})
    prefix = line_prefix(args.config, lines)
    preset = args.preset or values.get("preset")
    memory = args.memory or values.get("memory")
    with problems.collect():
        kept = {key: value for key, value in values.items() if not _is_ignored(key)}
        values = read_values(kept, _setting_of_file, prefix)
    flags = {name: value for name, value in vars(args).items() if name in known}
    with problems.collect():
        flags = read_values(flags, known.__getitem__)
    problems.raise_all()
    # A file with all settings was written by a run, not typed.
    typed = flags.keys() if known.keys() <= values.keys() else values.keys() | flags.keys()
    if values and flags:
        family = known_family(_base_of(values)) or DEFAULT_FAMILY
        defaults = _usual_sampling() | dict(family.defaults) | _of_samples(values)
        family = replace(family, defaults=defaults)
        resolution = known_info(_model_of(values)).resolution
        values = overridden(values, flags, family, resolution)
    values = _of_samples(values | flags) | values
    if preset is not None:
        values = _preset(str(preset), values | flags) | values
    elif of_base := known_family(_base_of(values | flags)):
        values = {**of_base.defaults, **values}
    if memory is not None:
        values = _fitting(str(memory), values | flags) | values
    try:
        config = TrainConfig.from_dict(values | flags)
    except ForeignFileError:
        raise
    except ConfigError as error:
        line = "" if error.setting in flags else prefix(error.setting)
        raise ConfigError(f"{line}{error}", error.setting) from error
    _warn_of_flags(args, config, flags)
    for line in notes(config, settings(), typed):
        warnings.warn(line, stacklevel=1)
    if preset is not None:
        _warn_of_photos(str(preset), config)
    return config


def _warn_of_photos(preset: str, config: TrainConfig) -> None:
    """Warn if a preset is meant for another number of photos."""
    from dora_diffusion.data.photos import photos_in

    for folder in filter(None, (subject.instance_data_dir for subject in config.subjects)):
        if advice := PRESETS[preset].photos_advice(len(photos_in(Path(folder).expanduser()))):
            warnings.warn(f"{folder}: {advice}", stacklevel=1)


def _preset(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a preset.

    Warns:
        UserWarning: If the steps are a guess, since the model is not on this machine, or if the
            preset is for other families.
    """
    from dora_diffusion.models.locate import family_of

    require_choice("preset", name, tuple(PRESETS))
    model = _model_of(values)
    family = family_of(_base_of(values))
    preset = preset_settings(name, family or DEFAULT_FAMILY, is_embedded=is_embedded(model))
    if family is None and "max_train_steps" not in values:
        warnings.warn(
            f"{model} is not on this machine; the preset assumes {DEFAULT_FAMILY.title} and "
            f"{preset['max_train_steps']} steps; give --max_train_steps for another family",
            stacklevel=1,
        )
    if family and (advice := preset_advice(name, family)):
        warnings.warn(advice, stacklevel=1)
    return preset


def _model_of(values: Mapping[str, Any]) -> str:
    """Return the name of the base model in settings."""
    default = TrainConfig.pretrained_model_name_or_path
    return str(values.get("pretrained_model_name_or_path", default))


def _of_samples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of samples on another model than the base; empty without one."""
    if not (model := values.get("sample_model")):
        return {}
    return _usual_sampling() | sampling_values(str(model))


def _usual_sampling() -> dict[str, Any]:
    return {name: getattr(TrainConfig, name) for name in SAMPLES.values()}


def _base_of(values: Mapping[str, Any]) -> BaseModel:
    """Return the base model in settings, as far as its family depends on them."""
    names = ("model_config", "distilled")
    options: dict[str, Any] = {name: values.get(name) for name in names}
    return BaseModel(_model_of(values), **options)


def _fitting(memory: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that fit a memory, given in GiB or as ``auto``.

    Raises:
        ConfigError: If the memory is neither.

    Warns:
        UserWarning: If the model is embedded, and so fits anywhere; or if it was not measured.
    """
    from dora_diffusion.models.locate import model_info
    from dora_diffusion.models.memory import (
        describe_device,
        fitting_settings,
        gpu_of,
        needed_memory,
    )

    device = describe_device() if memory == "auto" else gpu_of(memory)
    current = {**TrainConfig().to_dict(), **values}
    model = str(current["pretrained_model_name_or_path"])
    if is_embedded(model):
        warnings.warn(f"memory has no effect because {model} fits anywhere", stacklevel=1)
        return {}
    info = model_info(model)
    batch = int(current["train_batch_size"]) * (2 if current["with_prior_preservation"] else 1)
    family, size = info.family if info.has_released_shape else "", current["resolution"]
    size = size or info.resolution
    fitting = fitting_settings(family, size, device, batch=batch)
    if family and needed_memory(family, size, fitting, device, batch=batch) is None:
        warnings.warn(
            f"memory {memory} is not compared with training of {model} on {device.name}, which was "
            "not measured; gradient checkpointing is on",
            stacklevel=1,
        )
    return fitting


def _is_ignored(key: str) -> bool:
    """Return whether a key of a file is not a setting, with a warning if it has no effect here."""
    answer = DIFFUSERS_FLAGS.get(key)
    if answer and answer.status == "ignored":
        _warn_ignored(key)
        return True
    return key in ("preset", "memory")


def _setting_of_file(key: str) -> Setting:
    """Look up a setting by its name or by Diffusers' name.

    Raises:
        ConfigError: If there is none.
    """
    answer = DIFFUSERS_FLAGS.get(key)
    name = answer.setting if answer and answer.status == "renamed" else key
    return find_training_setting(name, settings_by_name())


def _warn_of_flags(args: argparse.Namespace, config: TrainConfig, flags: Mapping[str, Any]) -> None:
    """Warn about ignored flags, and flags at their default that have no effect.

    Training warns about settings without effect that differ from their default.
    """
    for name in vars(args):
        if name in DIFFUSERS_FLAGS and DIFFUSERS_FLAGS[name].status == "ignored":
            _warn_ignored(name)
    defaults = {setting.name: setting.default for setting in settings()}
    at_default = {name for name in flags if getattr(config, name) == defaults[name]}
    family = known_family(config.base_model)
    for reason in without_effect(config, at_default, family).values():
        warnings.warn(reason, stacklevel=1)


def _warn_ignored(name: str) -> None:
    warnings.warn(f"{name} is not needed: {DIFFUSERS_FLAGS[name].text}", stacklevel=1)
