"""Code by room of the package: lines, modules, functions, and circles of imports.

    python -m tools.count [--modules] [--at REVISION]
    python -m tools.count --since f7ffc87      # the table of docs/contributing/architecture.md

A line of code holds more than a comment or a docstring. A circle is a set of modules each of which
reaches the others by imports, those inside of functions and those for type checkers included.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import subprocess
import tarfile
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "dora_diffusion"
EXTRAS = ("cluster", "studio", "toy")
"""Rooms that the core never imports."""
FORMER = {
    **dict.fromkeys(("app", "jobs"), "studio"),
    **dict.fromkeys(("study", "analysis", "simulation"), "lab"),
    **dict.fromkeys(("fleet", "serving"), "cluster"),
    **dict.fromkeys(("commands", "console"), "cli"),
    "prepare": "data",
}
"""Packages of before there were rooms, and the rooms that most of each is in."""
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


class Module(NamedTuple):
    """One file: its dotted name in the package, its lines of code, and its functions' lengths."""

    name: str
    lines: int
    functions: list[int]

    @property
    def room(self) -> str:
        return self.name.partition(".")[0] if "." in self.name else "(loose)"


def modules(package: Path) -> list[Module]:
    """Read every module below a package's folder."""
    found = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        name = dotted(path, package)
        if path.name == "__init__.py" and path.parent != package:
            name += ".__init__"
        found.append(Module(name, len(code_lines(text, tree)), function_lengths(tree)))
    return found


def dotted(path: Path, package: Path) -> str:
    """``package/a/b.py`` -> ``a.b``; a package's ``__init__.py`` has the name of its folder."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def function_lengths(tree: ast.Module) -> list[int]:
    """Lines of the body of each function, without its docstring."""
    lengths = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lengths.append((body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0)
    return lengths


def imports(package: Path) -> dict[str, set[str]]:
    """The modules of a package's folder that each of its modules imports, by dotted names."""
    paths = {dotted(path, package): path for path in package.rglob("*.py")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    nodes = {name: ast.walk(ast.parse(text)) for name, text in texts.items()}
    return graph(nodes, package.name)


def graph(nodes: Mapping[str, Iterable[ast.AST]], package: str) -> dict[str, set[str]]:
    """The same, from each module's nodes."""
    return {
        name: {t for node in module for t in _targets(node, package, nodes) if t != name}
        for name, module in nodes.items()
    }


def _targets(node: ast.AST, package: str, names: Container[str]) -> Iterator[str]:
    prefix = f"{package}."
    if isinstance(node, ast.Import):
        wanted = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        # `from package.a import b`: b is a module of its own, or a name in a.
        wanted = [name if name.removeprefix(prefix) in names else node.module for name in inner]
    else:
        return
    for name in wanted:
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and short in names:
            yield short


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module, largest first (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            cut = stack.index(node)
            found.append(sorted(stack[cut:]))
            del stack[cut:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted((circle for circle in found if len(circle) > 1), key=lambda c: (-len(c), c))


def table(found: list[Module]) -> str:
    """A Markdown table with a row for each room."""
    rooms: dict[str, list[Module]] = defaultdict(list)
    for module in found:
        rooms[module.room].append(module)
    core = [module for module in found if module.room not in EXTRAS]
    rows = [*sorted(rooms.items()), ("**core**", core), ("**all**", found)]
    head = (
        "room",
        "lines of code",
        "modules",
        "functions, median",
        "up to 3 lines",
        "over 40 / 60",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, members in rows:
        lengths = [length for module in members for length in module.functions]
        median = statistics.median(lengths) if lengths else 0
        short = sum(length <= 3 for length in lengths)
        over = [sum(length > limit for length in lengths) for limit in (40, 60)]
        lines.append(
            f"| {name} | {sum(module.lines for module in members):,} | {len(members)} "
            f"| {len(lengths):,}, {median:g} | {short} | {over[0]} / {over[1]} |"
        )
    return "\n".join(lines)


def comparison(before: list[Module], after: list[Module]) -> str:
    """A Markdown table of lines and modules by room, before and after."""
    sides = [defaultdict[str, list[int]](list) for _ in range(2)]
    for side, found in zip(sides, (before, after), strict=True):
        for module in found:
            room = FORMER.get(module.room, module.room)
            for name in (room, "**all**", *(["**core**"] if room not in EXTRAS else [])):
                side[name].append(module.lines)
    lines = ["| room | lines before | now | modules before | now |", "|---|---|---|---|---|"]
    for name in sorted(sides[1], key=lambda name: (name.startswith("*"), name)):
        old, new = (side[name] for side in sides)
        lines.append(f"| {name} | {sum(old):,} | {sum(new):,} | {len(old)} | {len(new)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the code of a package by room.")
    parser.add_argument("--modules", action="store_true", help="List every module, longest first.")
    parser.add_argument("--at", metavar="REVISION", help="Count an earlier state, such as v0.1.0.")
    parser.add_argument("--since", metavar="REVISION", help="Compare with an earlier state.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        package = extracted(args.at, Path(folder)) if args.at else PACKAGE
        found, closed = modules(package), circles(imports(package))
        if args.since:
            print(comparison(modules(extracted(args.since, Path(folder))), found))
            return
    if args.modules:
        for module in sorted(found, key=lambda module: -module.lines):
            print(f"{module.lines:5} {module.name}")
    print(table(found))
    print(f"\nCircles of imports: {len(closed)}")
    for circle in closed:
        print(f"- {', '.join(circle)}")


def extracted(revision: str, folder: Path) -> Path:
    """The package as a revision of the repository has it, written into a folder."""
    command = ["git", "archive", revision, PACKAGE.name]
    archive = subprocess.run(command, cwd=PACKAGE.parent, check=True, stdout=subprocess.PIPE)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder / PACKAGE.name


if __name__ == "__main__":
    main()
