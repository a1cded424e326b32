"""Settings of a command, from its flags, a YAML file or Python."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from dora_diffusion.config.config_file import read_config_lines
from dora_diffusion.config.fields import Setting, require
from dora_diffusion.config.file import line_prefix
from dora_diffusion.config.flag_map import find_setting, notes
from dora_diffusion.config.problems import Problems, read_values

if TYPE_CHECKING:
    from typing_extensions import Self

Group = TypeVar("Group", bound="CommandSettings")


def group(kind: type[Group]) -> Group:
    """A dataclass field that is a group of settings, each of them a setting of the command too."""
    made: Group = field(metadata={"settings": kind})
    return made


@dataclass(frozen=True, kw_only=True)
class CommandSettings:
    """Settings of a command: each field made with `flag` is a setting, and `perform` runs it.

    Raises:
        ConfigError: If a value cannot work.
    """

    def __post_init__(self) -> None:
        self._check(self.values())

    @classmethod
    def _check(cls, values: Mapping[str, Any]) -> None:
        problems = Problems()
        for setting in cls.settings():
            with problems.collect():
                if setting.name in values:
                    setting.check(values[setting.name])
        problems.raise_all()

    @classmethod
    @cache
    def settings(cls) -> tuple[Setting, ...]:
        """All settings: required ones, then the others in the order of their fields and groups."""
        listed: list[Setting] = []
        for source in fields(cls):
            if kind := source.metadata.get("settings"):
                listed += kind.settings()
            elif "help" in source.metadata:
                listed.append(Setting.from_field(source))
        return tuple(sorted(listed, key=lambda setting: not setting.is_required))

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Make settings from values by name, each in its group.

        Raises:
            ConfigError: If a value cannot work.
        """
        cls._check(values)  # Before the groups, so that one error names all settings.
        for source in fields(cls):
            if kind := source.metadata.get("settings"):
                names = {member.name for member in fields(kind)} & values.keys()
                values[source.name] = kind.of(**{name: values.pop(name) for name in names})
        return cls(**values)

    def values(self) -> dict[str, Any]:
        """All values by name, as `of` takes them."""
        flat: dict[str, Any] = {}
        for source in fields(self):
            value = getattr(self, source.name)
            flat |= value.values() if "settings" in source.metadata else {source.name: value}
        return flat

    @property
    def flat(self) -> Any:
        """The settings with all values as attributes, as conditions read them: without groups."""
        has_groups = any("settings" in source.metadata for source in fields(self))
        return SimpleNamespace(**self.values()) if has_groups else self

    def changed(self, **changes: Any) -> Self:
        """Copy the settings with other values, by name, in any group."""
        return self.of(**self.values() | changes)

    @classmethod
    def read(cls, flags: Mapping[str, Any], file: str | None = None) -> Self:
        """Build the settings from a YAML file, overridden by the values of a command line.

        Raises:
            ConfigError: If the file or a value is not valid (with the line in the file), or a
                setting is missing.
        """
        known = {setting.name: setting for setting in cls.settings()}
        find, problems = partial(find_setting, known=known), Problems()
        values, lines = read_config_lines(file) if file else ({}, {})
        with problems.collect():
            values = read_values(values, find, line_prefix(file, lines))
        with problems.collect():
            values |= read_values({name: flags[name] for name in known.keys() & flags.keys()}, find)
        problems.raise_all()
        missing = [s.name for s in known.values() if s.is_required and s.name not in values]
        require(not missing, f"{', '.join(missing)} must be given", missing[0] if missing else "")
        return cls.of(**values)

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
        for line in notes(settings.flat, cls.settings(), names):
            warnings.warn(line, stacklevel=2)
        return settings

    def perform(self) -> int:
        """Run the command. Returns the exit code."""
        raise NotImplementedError

    def without_effect(self) -> dict[str, str]:
        """Settings without effect that differ from their default, each with the reason."""
        flat = self.flat
        changed = [s for s in self.settings() if getattr(flat, s.name) != s.default]
        return {s.name: reason for s in changed if (reason := s.inactive_reason(flat))}

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
        values = self.values()
        for setting in self.settings():
            value = values[setting.name]
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
