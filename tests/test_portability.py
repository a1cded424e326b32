"""The code is not written for POSIX: names that Windows has not, and text in no named encoding."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.portable.windows import GONE, GONE_MODULES

ROOT = Path(__file__).parents[1]
PACKAGE = [*ROOT.glob("dora_diffusion/**/*.py"), *ROOT.glob("*.py")]
SOURCES = PACKAGE + [
    p for top in ("tools", "benchmarks", "tests") for p in ROOT.glob(f"{top}/**/*.py")
]
# The one module that may have what only POSIX has.
HOME = ROOT / "dora_diffusion" / "system.py"
# On Windows it ends a process, whatever the signal.
GONE_HERE = {"os": (*GONE["os"], "kill"), "signal": GONE["signal"]}
KEYWORDS = ("start_new_session", "preexec_fn", "process_group", "pass_fds")


def posix_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that a module uses and Windows lacks, with their lines."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                gone = [alias.name for alias in names if alias.name in GONE_MODULES]
            case ast.ImportFrom(module=str(module), names=names):
                names_gone = GONE_HERE.get(module, ())
                gone = [alias.name for alias in names if alias.name in names_gone]
                gone += [module] if module in GONE_MODULES else []
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                gone = [f"{module}.{name}"] if name in GONE_HERE.get(module, ()) else []
            case ast.keyword(arg=str(name)) if name in KEYWORDS:
                gone = [name]
            case ast.Constant(value=str(text)) if (
                text.startswith("/proc") or text in GONE["signal"] or text in KEYWORDS
            ):
                gone = [text]
            case _:
                continue
        for name in gone:
            yield getattr(node, "lineno", 0), name


def texts_without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines that read or write text in whatever encoding the system has."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            names = {keyword.arg for keyword in node.keywords}
            if not names & {"encoding", None} and _is_text(node, names):
                yield node.lineno


def _is_text(call: ast.Call, keywords: set[str | None]) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    is_method = isinstance(call.func, ast.Attribute)
    match name:
        case "read_text" | "write_text":
            return len(call.args) < {"read_text": 1, "write_text": 2}[name]
        case "run" | "Popen" | "check_output":
            return bool(keywords & {"text", "universal_newlines"})
        case "open" | "fdopen" if not is_method or name == "fdopen":
            return "b" not in (_mode(call, 1) or "r")
        case "open":  # of a path, where its mode tells it from others of this name
            mode = _mode(call, 0)
            return mode is not None and set(mode) <= set("rwaxt+")
        case "NamedTemporaryFile" | "TemporaryFile" | "SpooledTemporaryFile":
            return "b" not in (_mode(call, int(name.startswith("Spooled"))) or "b")
    return False


def _mode(call: ast.Call, place: int) -> str | None:
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    given += call.args[place : place + 1]
    return given[0].value if given and isinstance(given[0], ast.Constant) else None


def test_what_only_posix_has_is_in_one_module() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in PACKAGE
        if path != HOME
        for line, name in posix_names(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set(), "Windows has no such thing; dora_diffusion/system.py is its one home"
    assert list(posix_names(ast.parse(HOME.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import fcntl", "fcntl"),
        ("from resource import getrusage", "resource"),
        ("from os import fork", "fork"),
        ("import os; os.killpg(1, 2)", "os.killpg"),
        ("import os; os.kill(1, 2)", "os.kill"),
        ("import os; os.sysconf('SC_PAGE_SIZE')", "os.sysconf"),
        ("import signal; signal.SIGKILL", "signal.SIGKILL"),
        ("import signal; getattr(signal, 'SIGHUP')", "SIGHUP"),
        ("open('/proc/meminfo')", "/proc/meminfo"),
        ("subprocess.Popen([], start_new_session=True)", "start_new_session"),
        ("Popen([], **{'start_new_session': True})", "start_new_session"),
    ],
)
def test_names_of_posix_are_found(code: str, name: str) -> None:
    assert [found for _, found in posix_names(ast.parse(code))] == [name]


def test_text_is_read_and_written_as_utf_8() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in texts_without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set(), 'give encoding="utf-8": Windows has another default'


@pytest.mark.parametrize(
    "code",
    [
        "path.read_text()",
        "path.write_text('a')",
        "open(path)",
        "open(path, 'w')",
        "open(path, mode='r+')",
        "path.open('w')",
        "path.open(mode='r')",
        "os.fdopen(3)",
        "subprocess.run(command, text=True)",
        "subprocess.Popen(command, universal_newlines=True)",
        "tempfile.NamedTemporaryFile('w')",
    ],
)
def test_texts_without_encoding_are_found(code: str) -> None:
    assert list(texts_without_encoding(ast.parse(code))) == [1]


@pytest.mark.parametrize(
    "code",
    [
        "path.read_text(encoding='utf-8')",
        "path.read_text('utf-8')",
        "path.write_text('a', 'utf-8')",
        "open(path, 'rb')",
        "open(path, encoding='utf-8')",
        "path.open('rb')",
        "PipelineFolder.open(folder)",
        "Image.open(path)",
        "subprocess.run(command, capture_output=True)",
        "subprocess.run(command, text=True, encoding='utf-8')",
        "tempfile.NamedTemporaryFile()",
        "open(path, **options)",
    ],
)
def test_what_is_no_text_or_says_its_encoding_is_fine(code: str) -> None:
    assert list(texts_without_encoding(ast.parse(code))) == []
