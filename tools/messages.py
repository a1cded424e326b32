"""Print every message of the package as a template, by room and kind, for a reader.

    python -m tools.messages > messages.md

A message is the text of an exception, of `require` and its like, or of a warning. What a program
puts into it stands in braces; a text that depends on a condition is listed with each of its ends.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "dora_diffusion"
_LONGEST = 40
"""Characters of an expression in braces; a longer one is left out."""
_KINDS = {"require": "ConfigError", "Excluded": "ConfigError", "warn": "warning"}
"""Functions that take a message, and what they make of it."""


class Message(NamedTuple):
    """One message: where it is raised, what it becomes, and its text with braces."""

    file: str
    line: int
    kind: str
    text: str

    @property
    def room(self) -> str:
        return self.file.partition("/")[0]


def messages(package: Path = PACKAGE) -> list[Message]:
    """Read all messages of a package, by file and line."""
    found = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [Message(file, *message) for message in sorted(_messages(tree, {}))]
    return found


def _messages(node: ast.AST, texts: dict[str, list[ast.expr]]) -> Iterator[tuple[int, str, str]]:
    """Messages below a node: line, kind and text; ``texts`` are values of a function's names."""
    for inner in ast.iter_child_nodes(node):
        known = _assigned(inner) if isinstance(inner, ast.FunctionDef) else texts
        if isinstance(inner, ast.Call) and (said := _argument(inner)):
            kind, argument = said
            values = known.get(argument.id, []) if isinstance(argument, ast.Name) else []
            for value in values or [argument]:
                yield inner.lineno, kind, template(value)
        yield from _messages(inner, known)


def _assigned(function: ast.FunctionDef) -> dict[str, list[ast.expr]]:
    """Texts that a function gives its names."""
    texts = defaultdict(list)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and _is_text(node.value):
            for target in node.targets:
                if isinstance(target, ast.Name) and template(node.value):
                    texts[target.id].append(node.value)
    return texts


def _argument(call: ast.Call) -> tuple[str, ast.expr] | None:
    """Return what a call makes of a message, and the message; None for other calls."""
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    kind = _KINDS.get(name, name if name.endswith("Error") and name[:1].isupper() else "")
    given = call.args[1:] if name in ("require", "Excluded") else call.args
    if not kind or not given:
        return None
    return kind, next(filter(_is_text, given), given[0])


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) or _is_text(node.orelse)
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def template(node: ast.expr) -> str:
    """The text of an expression, with braces around what is computed.

    Example:
        >>> template(ast.parse("f'{name} is {value!r}' + ('; stop' if late else '')").body[0].value)
        "{name} is {value}{'; stop' or ''}"
    """
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    if isinstance(node, ast.IfExp) and _is_text(node):
        return f"{{{template(node.body)!r} or {template(node.orelse)!r}}}"
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(inner, ast.IfExp) and _is_text(inner):
        return template(inner)
    text = ast.unparse(inner)
    return f"{{{text}}}" if len(text) <= _LONGEST else "{...}"


def report(found: list[Message]) -> str:
    """All messages as Markdown: a section for each room, a list for each kind."""
    sections: dict[tuple[str, str], list[str]] = defaultdict(list)
    for message in found:
        text = " ".join(message.text.split())
        line = f"- {text} (`{message.file}:{message.line}`)"
        sections[message.room, message.kind].append(line)
    lines, last = ["# Messages"], ""
    for (room, kind), entries in sorted(sections.items()):
        lines += [] if room == last else ["", f"## {room}"]
        lines += ["", f"### {kind}", "", *entries]
        last = room
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(messages()))
