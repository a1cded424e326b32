"""Files of the repository, each read and parsed once for all rules."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
PACKAGE = "dora_diffusion"
FOLDERS = ("benchmarks", "docs", PACKAGE, "lab", "notebooks", "samples", "tests", "tools")
OTHERS = (".ci/run", "CITATION.cff", "Makefile", "pyproject.toml")
"""Files without a suffix of `SUFFIXES`, or outside of `FOLDERS`, that a rule reads."""
SUFFIXES = (".py", ".md", ".css", ".ipynb")

Node = TypeVar("Node", bound=ast.AST)


class Source:
    """Text of a file and, of a Python file, its syntax.

    Args:
        path: From the root of the repository, with slashes.
        text: What the file holds.
    """

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def _nodes(self) -> dict[type[ast.AST], list[ast.AST]]:
        nodes, left = defaultdict(list), list[ast.AST]([self.tree])
        while left:  # `ast.walk` takes three times as long.
            node = left.pop()
            nodes[type(node)].append(node)
            for name in node._fields:
                value = getattr(node, name, None)
                if isinstance(value, list):
                    left += [part for part in value if isinstance(part, ast.AST)]
                elif isinstance(value, ast.AST) and value._fields:
                    left.append(value)
        return nodes

    def nodes(self, *kinds: type[Node]) -> Iterator[Node]:
        """All nodes of these kinds, kind after kind."""
        for kind in kinds:
            yield from self._nodes.get(kind, ())  # type: ignore[misc]

    def strings(self) -> Iterator[tuple[ast.Constant, str]]:
        """Text constants, docstrings among them."""
        for node in self.nodes(ast.Constant):
            if isinstance(node.value, str):
                yield node, node.value

    def problem(self, at: ast.AST | int, message: str) -> str:
        """A finding, at a node or on a line."""
        line = at if isinstance(at, int) else getattr(at, "lineno", 1)
        return f"{self.path}:{line}: {message}"

    def line_of(self, place: int) -> int:
        """Number of the line of a place in the text."""
        return self.text.count("\n", 0, place) + 1


class Repository:
    """Sources by path.

    Args:
        texts: Text of each file.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.files = {path: Source(path, text) for path, text in sorted(texts.items())}

    @classmethod
    def read(cls) -> Repository:
        """Read this clone."""
        paths = [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *(ROOT / name for name in OTHERS)]
        for folder in FOLDERS:
            paths += [p for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES]
        names = {path.relative_to(ROOT).as_posix(): path for path in paths}
        return cls({name: path.read_text(encoding="utf-8") for name, path in names.items()})

    def python(self, *folders: str) -> list[Source]:
        """Python files below some folders, else all of them; "" is the root itself."""
        files = [source for path, source in self.files.items() if path.endswith(".py")]
        tops = [(source.path.rpartition("/")[0].partition("/")[0], source) for source in files]
        return [source for top, source in tops if top in folders or not folders]

    @property
    def tests(self) -> list[Source]:
        """Tests of the package and of the laboratory."""
        files = self.python("tests", "lab")
        return [file for file in files if file.path.startswith(("tests/", "lab/tests/"))]

    @property
    def package(self) -> list[Source]:
        return self.python(PACKAGE)

    def text(self, path: str) -> str:
        """Text of one file; nothing if there is none."""
        return self.files[path].text if path in self.files else ""
