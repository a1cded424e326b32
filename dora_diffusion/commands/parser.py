"""The parser of the command line: defaults in every help, and one plain line per mistake."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from dora_diffusion.wording import closest, counted, did_you_mean

_SWITCH = {"true": True, "yes": True, "on": True, "1": True}
_SWITCH |= {"false": False, "no": False, "off": False, "0": False}
_TYPES = {"int": "a whole number", "float": "a number"}


class HelpFormatter(argparse.HelpFormatter):
    """Help in which every optional flag says its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        takes_part = action.option_strings and not action.required and text
        if not takes_part or "Default:" in text or action.dest in ("help", "version"):
            return text
        default = {False: "off", True: "on", None: "none", "": "none"}.get(
            action.default if isinstance(action.default, bool | str | None) else "?", "%(default)s"
        )
        return f"{text} Default: {'none' if action.default == [] else default}."

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, SwitchAction):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


class SwitchAction(argparse.Action):
    """``--x``, ``--no-x``, and ``--x true`` as scripts with ``type=bool`` take it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        names = [*option_strings, *(f"--no-{name[2:]}" for name in option_strings)]
        super().__init__(names, dest, nargs="?", **more)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Set the value."""
        negated = str(option_string).startswith("--no-")
        value = True if values is None else _SWITCH.get(str(values).lower())
        if value is None or (negated and values is not None):
            parser.error(
                f"{option_string} takes no value {values!r}; write --{self.dest} or "
                f"--no-{self.dest}"
            )
        setattr(namespace, self.dest, value != negated)


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in one line and shows a short usage above it.

    Args:
        refusals: What to say of a flag that is unknown here, by its name without dashes.
        kwargs: What `argparse.ArgumentParser` takes.
    """

    def __init__(self, *args: Any, refusals: Any = None, **kwargs: Any) -> None:
        # No abbreviations: a flag that is added later would break them.
        kwargs = {"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs}
        super().__init__(*args, **kwargs)
        self._refusals = refusals or (lambda name: None)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, after looking for flags that do not exist, and refuse what is left over."""
        words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:
            self._refuse_unknown_flags(words)
        known, left = super().parse_known_args(words, namespace)
        if left:
            what = counted(len(left), "word")
            self.error(f"{what} too many: {' '.join(left)}; put a value that has spaces in quotes")
        return known, left

    def _refuse_unknown_flags(self, words: Sequence[str]) -> None:
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        unknown = []
        for word in words:
            if word == "--":
                break
            name = word.partition("=")[0]
            if name.startswith("--") and name not in flags:
                unknown.append(self._answer(name, flags))
        if unknown:
            self.error("; ".join(dict.fromkeys(unknown)))

    def _answer(self, name: str, flags: Sequence[str]) -> str:
        refusal = self._refusals(name[2:].replace("-", "_"))
        if refusal:
            return f"--{refusal}"
        return f"there is no flag {name}{did_you_mean(name, flags)}"

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, with exit code 2."""
        self.exit(2, f"usage: {self._short_usage()}\nerror: {self._plain(message)}\n")

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

    def _plain(self, message: str) -> str:
        """A message of argparse in the words of the other errors."""
        choice = re.fullmatch(
            r"argument (.+?): invalid choice: '?(.*?)'? \(choose from (.*)\)", message, re.DOTALL
        )
        if choice:
            choices = [word.strip().strip("'") for word in choice[3].split(",")]
            what = "there is no command" if choice[1] == "COMMAND" else f"{choice[1]} cannot be"
            near = closest(choice[2], choices)
            hint = f" (did you mean {near}?)" if near else ""
            return f"{what} {choice[2]!r}{hint}; choose {', '.join(choices)}"
        number = re.fullmatch(r"argument (.+?): invalid (\w+) value: (.*)", message, re.DOTALL)
        if number:
            return f"{number[1]} is {number[3]}; it must be {_TYPES.get(number[2], number[2])}"
        missing = re.fullmatch(r"argument (.+?): expected (?:one|at least one) argument", message)
        if missing:
            return f"{missing[1]} needs a value"
        required = re.fullmatch(r"the following arguments are required: (.*)", message)
        if required:
            return f"{required[1]} must be given"
        return message
