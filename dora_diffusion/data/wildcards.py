"""Wildcards of captions: ``{a|b}`` is one of its alternatives, ``__file__`` a line of a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch

from dora_diffusion.config.fields import ConfigError
from dora_diffusion.config.wording import quoted

# Backslashes before other characters are those of tags: saber \(fate\).
_PIECE = re.compile(
    r"\\(?P<escaped>[{}|]|__)|__(?P<file>[^\W_](?:[\w ./-]*?[^\W_])?)__|(?P<mark>[{}|])"
    r"|[^\\{}|_]+|."
)
WILD = re.compile(r"(?<!\\)\{[^{}]*\|[^{}]*\}|(?<!\\)__[^\W_](?:[\w ./-]*?[^\W_])?__")
"""Pattern of a wildcard."""
# Of a text with more alternatives, the first ones.
MOST_VARIANTS = 1000


@dataclass(frozen=True, eq=False)
class Choice:
    """Choice among several templates."""

    alternatives: tuple[Template, ...]


Template = tuple["str | Choice", ...]
"""A text taken apart: what is said, and what is chosen, in order."""

Pick = Callable[[Choice], Template]


def render(template: Sequence[str | Choice], pick: Pick) -> str:
    """The text of a template, its alternatives picked one by one."""
    parts = (part if isinstance(part, str) else render(pick(part), pick) for part in template)
    return "".join(parts)


def at_random(generator: torch.Generator) -> Pick:
    """Pick any alternative, each as likely as the others."""

    def pick(choice: Choice) -> Template:
        number = torch.randint(len(choice.alternatives), (), generator=generator)
        return choice.alternatives[int(number)]

    return pick


def preferring(wanted: Callable[[str], bool]) -> Pick:
    """Pick the first alternative whose text is wanted, or else the first.

    Of texts that a word is in or not, no combination of alternatives avoids it where these do not.
    """
    picked: dict[Choice, Template] = {}

    def pick(choice: Choice) -> Template:
        if choice not in picked:
            each = choice.alternatives
            picked[choice] = next((one for one in each if wanted(render(one, pick))), each[0])
        return picked[choice]

    return pick


def variants(template: Template) -> list[str]:
    """Texts in which each alternative occurs, the first with the first of all."""
    parts = [
        [part]
        if isinstance(part, str)
        else list(islice(chain.from_iterable(map(variants, part.alternatives)), MOST_VARIANTS))
        for part in template
    ]
    rows = range(max(map(len, parts), default=1))
    return ["".join(part[row % len(part)] for part in parts) for row in rows]


class Wildcards:
    r"""Parser of captions; ``\{``, ``\}``, ``\|`` and ``\__`` are the characters themselves.

    Args:
        folder: Of the files: ``__colours__`` is a line of ``colours.txt``, ``__sea/fish__`` one of
            ``sea/fish.txt``. Empty lines and those that start with ``#`` are none. Lines may hold
            wildcards themselves.

    Raises:
        ConfigError: If there is no such folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(
                f"wildcard_dir {folder} is not a folder; give one of .txt files", "wildcard_dir"
            )
        self._templates: dict[str, Template] = {}
        self._files: dict[str, Choice] = {}

    def parse(self, text: str) -> Template:
        """A text's template.

        Raises:
            ConfigError: If a brace lacks its other half, or a file is missing, empty, damaged or
                names itself.
        """
        if text not in self._templates:
            self._templates[text] = self._parse(text, ())
        return self._templates[text]

    def _parse(self, text: str, within: tuple[str, ...]) -> Template:
        groups: list[list[list[str | Choice]]] = [[[]]]  # Alternatives of each group that is open.
        for piece in _PIECE.finditer(text):
            part: str | Choice = piece["escaped"] or piece[0]
            if piece["file"]:
                part = self._file(piece["file"], within)
            elif piece["mark"] == "{":
                groups.append([[]])
                continue
            elif piece["mark"] == "|" and len(groups) > 1:
                groups[-1].append([])
                continue
            elif piece["mark"] == "}":
                if len(groups) == 1:
                    raise ConfigError(rf"{quoted(text)} has }} without {{; the character is \}}")
                part = Choice(tuple(map(tuple, groups.pop())))
            groups[-1][-1].append(part)
        if len(groups) > 1:
            raise ConfigError(rf"{quoted(text)} has {{ without }}; the character is \{{")
        return tuple(groups[0][0])

    def _file(self, name: str, within: tuple[str, ...]) -> Choice:
        if name in within:
            raise ConfigError(
                f"the wildcard __{name}__ names itself: {' > '.join((*within, name))}"
            )
        if name not in self._files:
            lines = (" ".join(line.split()) for line in self._read(name).splitlines())
            texts = [line for line in lines if line and not line.startswith("#")]
            if not texts:
                raise ConfigError(f"the wildcard __{name}__ has no line in {name}.txt to choose")
            inner = (*within, name)
            self._files[name] = Choice(tuple(self._parse(text, inner) for text in texts))
        return self._files[name]

    def _read(self, name: str) -> str:
        if self.folder is None:
            raise ConfigError(
                f"the wildcard __{name}__ is of a file; name its folder: wildcard_dir"
            )
        path = self.folder / f"{name}.txt"
        if ".." in Path(name).parts or not path.is_file():
            raise ConfigError(f"the wildcard __{name}__ has no file {name}.txt in {self.folder}")
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: the wildcards are not UTF-8 text; save it as UTF-8"
            ) from error
