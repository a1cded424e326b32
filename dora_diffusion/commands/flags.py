"""The training flags, made from the fields of `TrainConfig`: name, type, choices and help."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from typing import Any

from dora_diffusion.config import ConfigError, TrainConfig, read_config_file, setting_type


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and one flag per setting."""
    parser.add_argument(
        "--config", help="YAML file of settings; flags given here take precedence over it."
    )
    for setting in dataclasses.fields(TrainConfig):
        _add_flag(parser, setting)


def _add_flag(parser: argparse.ArgumentParser, setting: dataclasses.Field[Any]) -> None:
    kind, is_list = setting_type(setting)
    # A flag that is not given leaves no trace, so that it does not override the file.
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(setting)}
    if kind is bool:
        parser.add_argument(f"--{setting.name}", action=argparse.BooleanOptionalAction, **common)
        return
    if is_list:
        common["nargs"] = "+"
    parser.add_argument(
        f"--{setting.name}", type=kind, choices=setting.metadata.get("choices"), **common
    )


def _help(setting: dataclasses.Field[Any]) -> str:
    text = str(setting.metadata["help"])
    if setting.default is dataclasses.MISSING:
        assert setting.default_factory is not dataclasses.MISSING
        default: Any = " ".join(setting.default_factory())
    else:
        default = setting.default
    if isinstance(default, bool):
        default = "on" if default else ""
    if default not in (None, ""):
        text += f" Default: {default}."
    return text.replace("%", "%%")


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The settings of a command line: the file's, with the given flags over them.

    Raises:
        ConfigError: If the file or a value is not valid.
    """
    names = {setting.name for setting in dataclasses.fields(TrainConfig)}
    values = read_config_file(args.config) if args.config else {}
    unknown = [_suggest(name, names) for name in sorted(set(values) - names, key=str)]
    if unknown:
        raise ConfigError(f"{args.config} has unknown settings: {', '.join(unknown)}")
    given = {name: value for name, value in vars(args).items() if name in names}
    return TrainConfig.from_dict(values | given)


def _suggest(name: Any, names: set[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"{name} (did you mean {close[0]}?)" if close else str(name)
