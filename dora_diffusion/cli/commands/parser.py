"""Parser of the command line, with defaults in every help text and one-line errors."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from dora_diffusion.config.fields import Setting
from dora_diffusion.config.flag_map import removal
from dora_diffusion.config.wording import closest, counted

SWITCH_WORDS = {"true": True, "yes": True, "on": True, "1": True}
SWITCH_WORDS |= {"false": False, "no": False, "off": False, "0": False}
# Names of flags in other programs.
OTHER_NAMES = {
    "model": "base", "checkpoint": "base", "lora": "adapter", "out": "output", "n": "num_images",
    "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "num_inference_steps": "steps",
    "sampler": "scheduler", "format": "to", "negative": "negative_prompt", "weight": "strength",
}  # fmt: skip
# Other names of convert --to's programs that `closest` misses or confuses.
_OTHER_VALUES = {
    "automatic1111": "a1111", "webui": "a1111", "stable-diffusion-webui": "a1111",
    "kohya-ss": "sd-scripts", "kohya-sd-scripts": "sd-scripts", "sd-webui-forge": "forge",
}  # fmt: skip
_TYPES: dict[Any, str] = {int: "a whole number", float: "a number"}
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
# Flags for files that may contain required settings.
_SOURCES = ("--config", "--repeat")
CONFIG_HELP = "YAML file of settings; flags given here take precedence over it. Default: none."


def nearest_name(name: str, known: Collection[str]) -> str | None:
    """Return the known name of a setting that an unknown one probably means, or None."""
    meant = OTHER_NAMES.get(name)
    return meant if meant in known else closest(name, known)


class SwitchAction(argparse.Action):
    """Switch ``--x`` or ``--no-x``."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        names = [*option_strings, *(f"--no-{name[2:]}" for name in option_strings)]
        super().__init__(names, dest, nargs=0, **more)

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        """Set the value."""
        setattr(namespace, self.dest, not option.startswith("--no-"))


class _HelpAllAction(argparse.Action):
    """Print the help with all flags and exit."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        parser.first = None
        parser.print_help()
        parser.exit()


_SHOWN = (argparse._HelpAction, _HelpAllAction)


class Parser(argparse.ArgumentParser):
    """Parser with one-line errors below a short usage.

    Attributes:
        refusal: Returns the error for a flag of former versions or other programs, given without
            dashes; None for other flags.
        meant_by: Returns the flag that an unknown one stands for, or None; both without dashes.
        first: Destinations of the flags in ``--help``, if ``--help-all`` shows the rest; None: all.
        has_file: Whether a file may contain the required settings.
    """

    def __init__(self, **options: Any) -> None:
        # No abbreviations, since a new flag could make them ambiguous.
        super().__init__(**{"allow_abbrev": False, **options})
        self.refusal: Callable[[str], str | None] = removal
        self.meant_by: Callable[[str], str | None] = self._near_flag
        self.first: Container[str] | None = None
        self.has_file = False

    def add_settings(self, settings: Iterable[Setting]) -> None:
        """Add ``--config``, and a flag for each setting of a command."""
        self.has_file = True
        self.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
        add_flags(self, settings)

    def split_help(self, first: Container[str]) -> None:
        """Show some flags with ``--help``, and all of them with ``--help-all``."""
        self.first = first
        text = "Show all flags and exit."
        self.add_argument("--help-all", action=_HelpAllAction, nargs=0, help=text)

    def format_help(self) -> str:
        """Return the help, without flags that only ``--help-all`` shows."""
        hidden = [
            (action, action.help) for action in self._actions
            if self.first is not None and action.option_strings
            and action.dest not in self.first and not isinstance(action, _SHOWN)
        ]  # fmt: skip
        for action, _ in hidden:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in hidden:
                action.help = text

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Check for unknown flags, parse, and report words that are left over."""
        words = sys.argv[1:] if args is None else list(args)
        commands = next((i for i, word in enumerate(words) if not word.startswith("-")), None)
        # Flags after a command are flags of the command.
        self._refuse_unknown_flags(words if self._subparsers is None else words[:commands])
        has_source = self.has_file and any(word.partition("=")[0] in _SOURCES for word in words)
        with self._with_nothing_required() if has_source else nullcontext():
            known, left = super().parse_known_args(self._with_plain_switches(words), namespace)
        if left:
            what = counted(len(left), "word")
            advice = "put a value that has spaces in quotes"
            if "--config" in self._option_string_actions and Path(left[0]).is_file():
                advice = f"a file of settings is given as --config {left[0]}"
            self.error(f"{what} too many: {' '.join(left)}; {advice}")
        return known, left

    @contextmanager
    def _with_nothing_required(self) -> Iterator[None]:
        """Require no flag and no positional argument inside the block."""
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        try:
            yield
        finally:
            for action in required:
                action.required = True

    def _with_plain_switches(self, words: Sequence[str]) -> list[str]:
        """Replace ``--x true`` and ``--x=no``, as in scripts with ``type=bool``, by the switch."""
        has_positional = not all(action.option_strings for action in self._actions)
        remaining, plain = deque(words), list[str]()
        while remaining:
            name, sign, value = (word := remaining.popleft()).partition("=")
            if isinstance(self._option_string_actions.get(name), SwitchAction):
                following = remaining[0] if remaining and not sign else "-"
                # With positional arguments, another word than true or false is one of them.
                if following.lower() in SWITCH_WORDS or not (
                    has_positional or following[:1] == "-"
                ):
                    sign, value = "=", remaining.popleft()
                word = self._switch(name, value) if sign else name
            plain.append(word)
        return plain

    def _switch(self, name: str, value: str) -> str:
        is_on = SWITCH_WORDS.get(value.lower())
        if is_on is None or name.startswith("--no-"):
            other = name.removeprefix("--no-").removeprefix("--")
            self.error(f"{name} takes no value {value!r}; write --{other} or --no-{other}")
        return name if is_on else f"--no-{name[2:]}"

    def _refuse_unknown_flags(self, words: Sequence[str]) -> None:
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        unknown = []
        for word in words:
            if word == "--":
                break
            name = word.partition("=")[0]
            if name.startswith("--") and name not in flags:
                unknown.append(self._answer(name))
        if unknown:
            self.error("; ".join(dict.fromkeys(unknown)))

    def _answer(self, name: str) -> str:
        word = name[2:].replace("-", "_")
        is_known = f"--{word}" in self._option_string_actions
        if not is_known and (refusal := self.refusal(word)):
            return f"--{refusal}"
        where = "" if self._subparsers is None else " before the command"
        meant = self.meant_by(name[2:])
        return f"there is no flag {name}{where}" + (f" (did you mean --{meant}?)" if meant else "")

    def _near_flag(self, name: str) -> str | None:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        known = [flag[2:] for flag in flags if not flag.startswith("--no-")]
        return nearest_name(name, known)

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2."""
        if missing := message.partition("the following arguments are required: ")[2]:
            message = f"{missing} must be given"
            if missing == "COMMAND":
                message = f"name a command: {', '.join(self._commands())}"
        self.exit(2, f"usage: {self._short_usage()}\nerror: {message}\n")

    def _short_usage(self) -> str:
        words = [self.prog]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                words.append("COMMAND ...")
            elif not action.option_strings:
                words.append(str(action.dest).upper())
            elif action.required:
                words.append(f"{action.option_strings[-1]} {action.dest.upper()}")
        return f"{' '.join(words)} [flags]   ({self.prog} --help lists them)"

    def _commands(self) -> list[str]:
        actions = (a for a in self._actions if isinstance(a, argparse._SubParsersAction))
        return [name for action in actions for name in action.choices]

    # Steps of argparse, with error messages in this package's wording.

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError as error:
            self.error(f"{error.argument_name} needs a value")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            kind = _TYPES.get(action.type, getattr(action.type, "__name__", "another value"))
            self.error(f"{error.argument_name} is {arg_string!r}; it must be {kind}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            is_command = isinstance(action, argparse._SubParsersAction)
            what = "there is no command" if is_command else f"{error.argument_name} cannot be"
            self.error(f"{what} {str(value)!r}{_other_choice(action, str(value))}")


def _other_choice(action: argparse.Action, value: str) -> str:
    """Return the reason why a value is refused, or the valid choices."""
    if reason := getattr(action, "refused", {}).get(value.lower()):
        return f": {reason}"
    choices = [choice for choice in action.choices or () if choice is not None]
    near = _OTHER_VALUES.get(value.lower().replace("_", "-"))
    near = near if near in choices else closest(value, choices)
    hint = f" (did you mean {near}?)" if near else ""
    return f"{hint}; choose {', '.join(choices)}"


def add_flags(parser: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    """Add a flag for each setting, under the heading of its group."""
    groups: dict[str, Any] = {"": parser}
    for setting in settings:
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        _add_flag(groups[setting.group], setting)


def _add_flag(group: Any, setting: Setting) -> None:
    """Add a setting to a parser or one of its groups.

    A flag that is not given is absent from the namespace, so that it does not override a file.
    """
    text = setting.help
    if not (setting.positional or setting.is_required or "Default:" in text):
        text += f" Default: {setting.default_text}."
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if setting.positional:
        if setting.is_list or not setting.is_required:
            common["nargs"] = "+" if setting.is_list else "?"
        group.add_argument(setting.name, metavar=setting.metavar or None, **common)
        return
    common |= {"required": setting.is_required, "dest": setting.name}
    names = setting.flags or (setting.flag,)
    if setting.kind is bool:
        group.add_argument(*names, action=SwitchAction, **common)
        return
    if setting.is_list and setting.kind is not dict:  # Lists of mappings are given as a file.
        common["nargs"] = "+"
    if setting.repeated:
        common["action"] = "extend"
    if setting.choices:
        # Diffusers' scripts write AdamW, and report_to may be none.
        either = (*setting.choices, None) if setting.default is None else setting.choices
        metavar = "{" + ",".join(setting.choices) + "}"
        common |= {"type": setting.cast, "choices": either, "metavar": metavar}
    elif setting.is_map:
        common |= {"metavar": "PATTERN=VALUE"}
    else:
        metavar = setting.metavar or ("PATH" if setting.is_path else _METAVARS[setting.kind])
        common |= {"type": str if setting.kind is dict else setting.kind, "metavar": metavar}
    group.add_argument(*names, **common).refused = setting.refused
