"""Settings of a command, from its flags, a YAML file or Python."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from dora_diffusion.config.elsewhere import notes
from dora_diffusion.config.fields import Setting, require
from dora_diffusion.config.file import read_config_lines
from dora_diffusion.config.problems import Problems
from dora_diffusion.config.wording import did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self


class AsJob(NamedTuple):
    """Description of a command as a job of the app, for a run or on its own.

    Attributes:
        command: Name of the command.
        state: Text of the job's state while it runs, such as ``"merging"``.
        verb: Label of its button, and beginning of the job's title.
        is_listed: Whether the Library lists its card among the results of runs.
        heading: Heading over its button in the Library; empty: it is elsewhere on the page.
        about: Description of its output, under the heading.
        output: End of its output's name, with the suffix; ``{NAME}`` is a setting. Empty: none.
        asked: Settings with a field in the form.
        fixed: Settings with a fixed value.
        with_other: Whether it also takes a second adapter.
    """

    command: str
    state: str
    verb: str
    is_listed: bool = True
    heading: str = ""
    about: str = ""
    output: str = ""
    asked: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = MappingProxyType({})
    with_other: bool = False


@dataclass(frozen=True, kw_only=True)
class CommandSettings:
    """Settings of a command: each field made with `flag` is a setting, and `perform` runs it.

    Attributes:
        job: Its job in the app; None if the app has none.
        more_jobs: Further jobs of the app that run the command, by name.

    Raises:
        ConfigError: If a value cannot work.
    """

    job: ClassVar[AsJob | None] = None
    more_jobs: ClassVar[Mapping[str, AsJob]] = MappingProxyType({})

    def __post_init__(self) -> None:
        problems = Problems()
        for setting in self.settings():
            with problems.collect():
                setting.check(getattr(self, setting.name))
        problems.raise_all()

    @classmethod
    @cache
    def settings(cls) -> tuple[Setting, ...]:
        """All settings, in the order of their fields; only fields made with `flag` are settings."""
        fields = (field for field in dataclasses.fields(cls) if "help" in field.metadata)
        return tuple(Setting.from_field(field) for field in fields)

    @classmethod
    def read(cls, flags: Mapping[str, Any], file: str | None = None) -> Self:
        """Build the settings from a YAML file, overridden by the values of a command line.

        Raises:
            ConfigError: If the file or a value is not valid (with the line in the file), or a
                setting is missing.
        """
        known = {setting.name: setting for setting in cls.settings()}
        values, lines = read_config_lines(file) if file else ({}, {})
        problems = Problems()
        for name, value in values.items():
            with problems.collect(f"{file}, line {lines[name]}: "):
                require(
                    name in known, f"there is no setting {name}{did_you_mean(name, known)}", name
                )
                values[name] = known[name].cast(value)
                known[name].check(values[name])
        for name in known.keys() & flags.keys():
            with problems.collect():
                values[name] = known[name].cast(flags[name])
        problems.raise_all()
        missing = [s.name for s in known.values() if s.is_required and s.name not in values]
        require(not missing, f"{', '.join(missing)} must be given", missing[0] if missing else "")
        return cls(**values)

    @classmethod
    def add_arguments(cls, parser: Any) -> None:
        """Add its flags to a `cli.commands.parser.Parser`."""
        parser.add_settings(cls.settings())

    @classmethod
    def of_arguments(cls, args: Any) -> Self:
        """Build the settings from the arguments that such a parser read.

        Raises:
            ConfigError: If a setting is missing or not valid.

        Warns:
            UserWarning: If a setting has no effect, or another meaning in other programs.
        """
        settings = cls.read(vars(args), args.config)
        settings.warn()
        names = [setting.name for setting in cls.settings()]
        for line in notes(settings, cls.settings(), names):
            warnings.warn(line, stacklevel=2)
        return settings

    def perform(self) -> int:
        """Run the command. Returns the exit code."""
        raise NotImplementedError

    def without_effect(self) -> dict[str, str]:
        """Settings without effect that differ from their default, each with the reason."""
        changed = [s for s in self.settings() if getattr(self, s.name) != s.default]
        return {s.name: reason for s in changed if (reason := s.inactive_reason(self))}

    def warn(self) -> None:
        """Warn about settings without effect.

        Warns:
            UserWarning: For each of them.
        """
        for name, reason in self.without_effect().items():
            warnings.warn(f"{name} has no effect because {reason}", stacklevel=2)

    def to_arguments(self) -> list[str]:
        """Command-line words for the settings that differ from their default."""
        positional: list[str] = []
        flags: list[str] = []
        for setting in self.settings():
            value = getattr(self, setting.name)
            if value == setting.default or value is None:
                continue
            words = [str(item) for item in (value if setting.is_list else [value])]
            if setting.positional:
                positional += words
            elif setting.kind is bool:
                flags.append(f"--{'' if value else 'no-'}{setting.name}")
            elif len(words) == 1 and words[0].startswith("-"):
                flags.append(f"{setting.flag}={words[0]}")
            else:
                flags += [setting.flag, *words]
        return positional + flags
