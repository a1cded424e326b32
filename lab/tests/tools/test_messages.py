"""The list of messages: no message of the package is left out of it."""

from __future__ import annotations

import ast
import doctest

from tools import messages

FOUND = messages.messages()


def test_known_messages_are_in_it_with_their_placeholders() -> None:
    texts = {(message.room, message.kind, message.text) for message in FOUND}
    assert {
        (
            "config",
            "ConfigError",
            "max_token_length is {value}; it must be a multiple of {TOKENS_PER_CHUNK}, such as 75, "
            "150 or 225, or 0 for no limit",
        ),
        ("config", "ConfigError", "{self.name} is {value}; it must {problem}"),
        ("config", "warning", "{name} has no effect because {reason}"),
    } - texts == set()
    assert doctest.testmod(messages).failed == 0
    report = messages.report(FOUND)
    assert report.startswith("# Messages\n\n## ")
    assert "\n## config\n\n### ConfigError\n\n- " in report
    assert "\n- {name} has no effect because {reason} (`config/command.py:" in report


def test_every_exception_of_ours_that_is_raised_with_a_text_is_listed() -> None:
    """Found by another way: by the classes that the package defines."""
    trees = {
        path.relative_to(messages.PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in messages.PACKAGE.rglob("*.py")
    }
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    ours = {n.name for _, n in nodes if isinstance(n, ast.ClassDef) and n.name.endswith("Error")}
    assert len(ours) > 20
    listed = {(message.file, message.line, message.kind) for message in FOUND}
    raised = {
        (file, node.exc.lineno, node.exc.func.id)
        for file, node in nodes
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if isinstance(node.exc.func, ast.Name) and node.exc.func.id in ours
        if node.exc.args and isinstance(node.exc.args[0], ast.JoinedStr | ast.Constant)
    }
    assert len(raised) > 200
    assert raised - listed == set()
