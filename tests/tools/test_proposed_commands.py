"""Commands that messages propose: each is complete, as the parser and the settings read it."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator

from dora_diffusion.cli.commands.adapters import ConvertSettings
from dora_diffusion.cli.main import COMMANDS, build_parser, read_settings
from dora_diffusion.config.families import FAMILIES
from dora_diffusion.formats.layouts import CONVERSIONS, PROGRAMS
from tests.every import every
from tools.messages import PACKAGE, template

# Words that the reader replaces, where any text would not do.
PLACEHOLDERS = {"ALPHA": "8", "FAMILY": next(iter(FAMILIES)), "PROGRAM": "comfyui", "RANK": "8"}
_NAMES = "|".join(sorted(COMMANDS, key=len, reverse=True))
# From the program's name to the end of the quotes, the clause or the text.
_COMMAND = re.compile(rf"dora-diffusion (?:{_NAMES})(?![\w-])[^'`;\n]*")
_INCOMPLETE = re.compile(rf"(?<!dora-diffusion )\b(?:{_NAMES}) --\w")
# The cards of models, whose commands are completed when they are written.
CARDS = ("training/results/card.py", "export/cards.yaml")


@functools.cache
def texts() -> list[tuple[str, str]]:
    """All texts of the package as templates, by file; without docstrings."""
    return [*_texts()]


def _texts() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*")):
        name = path.relative_to(PACKAGE).as_posix()
        if name in CARDS:
            continue
        if path.suffix in (".json", ".yaml"):
            yield from ((name, line) for line in path.read_text(encoding="utf-8").splitlines())
        elif path.suffix == ".py":
            yield from ((name, text) for text in _strings(ast.parse(path.read_text("utf-8"))))


def _strings(node: ast.AST) -> Iterator[str]:
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant):
            continue
        is_text = isinstance(inner, ast.Constant) and isinstance(inner.value, str)
        if is_text or isinstance(inner, ast.JoinedStr):
            yield template(inner)  # type: ignore[arg-type]
        else:
            yield from _strings(inner)


def test_a_proposed_command_is_complete() -> None:
    found = ((file, match) for file, text in texts() for match in _COMMAND.findall(text))
    proposed = list(dict.fromkeys(found))
    assert len(proposed) > 12
    files = {file for file, _ in proposed}
    assert {"adapters/fresh.py", "config/flags.json", "cli/console/errors.py"} <= files
    with every() as case:
        for file, command in proposed:
            with case(f"{file}: {command}"):
                try_out(command)


def try_out(command: str) -> None:
    words = shlex.split(re.sub(r"\{[^{}]*\}", "8", command))[1:]
    words = [PLACEHOLDERS.get(word, word) for word in words]
    settings = read_settings(build_parser(words[:1]).parse_args(words))
    if isinstance(settings, ConvertSettings):
        name = settings.to
        target = CONVERSIONS[PROGRAMS[name].output_axis if name in PROGRAMS else name]
        assert settings.base or not target.for_one_base
        assert settings.rank or settings.conv_rank or settings.energy or not target.needs_rank


def test_no_text_has_a_command_without_the_program() -> None:
    """With its flags alone, nobody can copy it."""
    assert [(f, t) for f, t in texts() if _INCOMPLETE.search(t)] == []
