"""The training flags, made from the fields of `TrainConfig`: name, type, choices and help."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from typing import Any

from dora_diffusion.commands.parser import SwitchAction
from dora_diffusion.config import (
    ConfigError,
    Setting,
    TrainConfig,
    read_config_lines,
    settings,
    without_effect,
)
from dora_diffusion.config.derived import overridden
from dora_diffusion.config.flag_map import DIFFUSERS_FLAGS, refusal
from dora_diffusion.wording import did_you_mean


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, one flag per setting, and what else Diffusers' scripts accept."""
    parser.add_argument(
        "--config", help="YAML file of settings; flags given here take precedence over it."
    )
    groups: dict[str, Any] = {}
    for setting in settings():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        _add_flag(groups[setting.group], setting)
    for name, answer in DIFFUSERS_FLAGS.items():
        hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if answer.status == "renamed":
            parser.add_argument(f"--{name}", dest=answer.setting, **hidden)
        elif answer.status == "ignored":
            parser.add_argument(f"--{name}", nargs="?", **hidden)


def _add_flag(group: Any, setting: Setting) -> None:
    # A flag that is not given leaves no trace, so that it does not override the file.
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(setting)}
    if setting.kind is bool:
        group.add_argument(f"--{setting.name}", action=SwitchAction, **common)
        return
    if setting.is_list:
        common["nargs"] = "+"
    if setting.choices:
        # Diffusers' scripts write AdamW.
        common |= {"type": setting.cast, "choices": setting.choices}
    else:
        common["type"] = setting.kind
    group.add_argument(f"--{setting.name}", **common)


def _help(setting: Setting) -> str:
    return f"{setting.help} Default: {setting.default_text}.".replace("%", "%%")


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The settings of a command line: the file's, with the given flags over them.

    Raises:
        ConfigError: If the file or a value is not valid; with the file's line, if it is there.

    Warns:
        UserWarning: Of flags that have no effect.
    """
    names = {setting.name for setting in settings()}
    values, lines = read_config_lines(args.config) if args.config else ({}, {})
    values = _known(args.config, values, lines, names)
    given = {name: value for name, value in vars(args).items() if name in names}
    values = overridden(values, given)
    try:
        config = TrainConfig.from_dict(values | given)
    except ConfigError as error:
        if error.setting in lines and error.setting not in given:
            place = f"{args.config}, line {lines[error.setting]}"
            raise ConfigError(f"{place}: {error}", error.setting) from error
        raise
    _warn_of_flags(args, config, given)
    return config


def given_settings(args: argparse.Namespace) -> set[str]:
    """Names of the settings that the command line or its file gives."""
    names = {setting.name for setting in settings()}
    values = read_config_lines(args.config)[0] if args.config else {}
    return names & (set(values) | set(vars(args)))


def _known(
    file: str, values: Mapping[str, Any], lines: Mapping[str, int], names: set[str]
) -> dict[str, Any]:
    """The file's settings, those under Diffusers' names renamed.

    Raises:
        ConfigError: If a key is not a setting.
    """
    found, unknown = {}, []
    for key, value in values.items():
        answer = DIFFUSERS_FLAGS.get(key)
        if key in names:
            found[key] = value
        elif answer and answer.status == "renamed":
            found[answer.setting] = value
        elif answer and answer.status == "ignored":
            _warn_ignored(key)
        else:
            what = refusal(key) or f"there is no setting {key}{did_you_mean(key, names)}"
            unknown.append(f"line {lines.get(key, '?')}: {what}")
    if unknown:
        raise ConfigError(f"{file}, {'; '.join(unknown)}")
    return found


def _warn_of_flags(args: argparse.Namespace, config: TrainConfig, given: Mapping[str, Any]) -> None:
    """Say which flags do nothing; those with another value than the default, training says."""
    for name in vars(args):
        if name in DIFFUSERS_FLAGS and DIFFUSERS_FLAGS[name].status == "ignored":
            _warn_ignored(name)
    defaults = {setting.name: setting.default for setting in settings()}
    at_default = {name for name in given if getattr(config, name) == defaults[name]}
    for reason in without_effect(config, at_default).values():
        warnings.warn(reason, stacklevel=1)


def _warn_ignored(name: str) -> None:
    warnings.warn(f"{name} is not needed: {DIFFUSERS_FLAGS[name].text}", stacklevel=1)
