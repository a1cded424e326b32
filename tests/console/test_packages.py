"""What is installed, and what of it does not work."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from dora_diffusion.console import packages as installed
from dora_diffusion.console import probe
from dora_diffusion.console.packages import NOT_TRIED, Package, ask, packages

ROOT = Path(__file__).parents[2]
MODULES = {
    "fine": "value = 1",
    "noisy": "import os; print('hello'); os.write(1, b'no newline')",
    "lacks": "raise ImportError('libcudart.so.12:\\n cannot open')",
    "leaves": "import sys; sys.exit('no display')",
    "dies": "import os; os._exit(132)",
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that do what packages do when they are imported."""
    for name, code in MODULES.items():
        (tmp_path / f"{name}_module.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")


def test_each_answers_for_itself_whatever_the_others_do(modules: None) -> None:
    names = ["dies", "noisy", "lacks", "leaves", "missing", "fine"]
    answers = ask([*(f"{name}_module" for name in names), "fine_module:value", "fine_module:none"])
    assert list(answers.values()) == [
        ("it ends Python, with exit code 132", None),
        ("", None),
        ("ImportError: libcudart.so.12: cannot open", None),
        ("SystemExit: no display", None),
        ("ModuleNotFoundError: No module named 'missing_module'", None),
        ("", None),
        ("", None),
        ("AttributeError: module 'fine_module' has no attribute 'none'", None),
    ]


def test_one_that_never_answers_is_named_and_the_others_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(command: list[str], timeout: float, **_: object) -> None:
        assert command[-3:] == ["a", "b", "c"]
        raise subprocess.TimeoutExpired(command, timeout, output=b'["", null]\n')

    monkeypatch.setattr(installed.subprocess, "run", run)
    assert ask(["a", "b", "c"], timeout=5) == {
        "a": ("", None),
        "b": ("it does nothing for 5 seconds", None),
        "c": (NOT_TRIED, None),
    }


def tried() -> list[Package]:
    found = [package for package in packages() if package.is_tried]
    optional = {"prodigyopt"} if find_spec("prodigyopt") else set()
    assert {"torch", "diffusers", "pillow", *optional} <= {package.name for package in found}
    return found


def test_what_is_tried_of_a_package_is_there() -> None:
    for package in tried():
        module, _, attribute = package.module.partition(":")
        assert find_spec(module), package
        assert not attribute or attribute in dir(import_module(module)), package


@pytest.mark.slow
def test_what_is_tried_of_a_package_works_where_the_package_does() -> None:
    assert [p.name for p in tried() if probe._answer(p.module)[0]] == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="this Python has no reader of TOML")
def test_a_clone_s_requirements_are_those_of_its_pyproject() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = {"": project["dependencies"], **project["optional-dependencies"]}
    expected = []
    for extra, lines in listed.items():
        for line in lines:
            name, bounds = re.fullmatch(r"([\w.-]+)(?:\[.*\])?([^;]*)(?:;.*)?", line).groups()
            if name != "dora-diffusion":  # other extras, which are listed themselves
                expected.append((extra, name, bounds.strip()))
    assert [(p.extra, p.name, p.bounds) for p in packages()] == expected
    assert len(expected) > 20


def test_a_wheel_s_requirements_are_those_of_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "torch>=2.4",
        "psutil>=6; sys_platform == 'win32'",
        'pillow-heif<9,>=0.1; extra == "heic"',
    ]
    monkeypatch.setattr(installed, "ROOT", tmp_path)
    monkeypatch.setattr(installed.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(installed, "installed_version", {"torch": "2.5"}.get)
    assert packages() == [
        Package("torch", "", ">=2.4", "2.5"),
        Package("psutil", "", ">=6", None),
        Package("pillow-heif", "heic", "<9,>=0.1", None),
    ]


@pytest.mark.parametrize(
    ("extra", "bounds", "version", "problem"),
    [
        ("", ">=2.4", "2.4.0+cpu", ""),
        ("", ">=2.4", "2.10.0.dev1", ""),
        ("", ">=2.4", "2.3.9", "torch 2.3.9 is installed, and >=2.4 is needed"),
        ("heic", ">=2.4", "2.3.9", "torch 2.3.9 is installed, and >=2.4 is needed"),
        ("", ">=2.4", None, "torch is not installed"),
        ("heic", ">=2.4", None, ""),
        ("", "", "1", ""),
    ],
)
def test_what_is_missing_or_too_old_is_a_problem(
    extra: str, bounds: str, version: str | None, problem: str
) -> None:
    assert Package("torch", extra, bounds, version).problem == problem


def test_what_is_for_developers_is_not_imported() -> None:
    assert Package("pytest", "test", "", "9").is_tried is False
    assert Package("pillow-heif", "heic", "", None).is_tried is False
    assert Package("pillow", "", "", "12").module == "PIL"
    assert Package("prodigyopt", "optimizers", "", "1").is_tried
