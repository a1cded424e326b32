"""The project around the code: its commands, its walks, the shape of its functions."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import dora_diffusion
from dora_diffusion.config import TrainConfig, read_config_file
from tools.count import circles, imports

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("samples/*/*.yaml")))
def test_sample_settings_are_valid(name):
    config = TrainConfig.from_dict(read_config_file(ROOT / "samples" / name / "config.yaml"))
    assert (ROOT / config.instance_data_dir).is_dir()


def test_no_test_needs_files_from_outside_the_clone():
    named = re.compile(r"parents\[\d\] / ['\"](\w+)['\"]")
    for path in (ROOT / "tests").rglob("*.py"):
        for name in named.findall(path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{path} reads {name}"


def test_ci_runs_exactly_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [
        line for line in script.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
    ]
    assert lines[-1] == "exec make test test-portable"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test", "test-portable"])
def test_a_fresh_machine_gets_an_environment_first(target, tmp_path):
    """Dry: what make would do where there is no virtual environment."""
    done = subprocess.run(
        ["make", "--dry-run", target, f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    steps = done.stdout
    # Gigabytes come: pip shows what it does.
    assert "--quiet" not in steps
    assert steps.index("-m venv") < steps.index("pip install")
    last = {"demo": "-m dora_diffusion demo", "test": "tests.suite"}.get(target, "tests/portable")
    assert steps.index("pip install") < steps.index(last)


def test_the_version_is_written_once():
    """In the package; the citation and the newest part of the changelog agree with it."""
    version = dora_diffusion.__version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert version not in project
    assert 'version = { attr = "dora_diffusion.__version__" }' in project
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)[0] == version


def test_the_entry_point_exists():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    module, name = re.search(r'^dora-diffusion = "(.+):(.+)"$', text, flags=re.MULTILINE).groups()
    assert callable(getattr(importlib.import_module(module), name))


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "dora_diffusion", "--version"],
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    assert done.stdout.strip() == dora_diffusion.__version__


def test_the_walks_name_what_there_is() -> None:
    """Dotted names under "Three walks" are modules of the package, or what they hold."""
    text = (ROOT / "docs" / "contributing" / "architecture.md").read_text(encoding="utf-8")
    walks = text.partition("## Three walks")[2].partition("\n## ")[0]
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", walks)
    assert len(names) > 20
    for name in names:
        pkgutil.resolve_name(f"dora_diffusion.{name}")


PACKAGE = ROOT / "dora_diffusion"
# What a user calls with keywords, each documented.
KEYWORD_INTERFACES = {
    "evaluation.photos.evaluate_photos",
    "lab.judges.evaluate_toy",
    "export.checkpoint.export_checkpoint",
    "export.derive.combine_adapters",
    "export.convert.convert_adapter",
    "export.derive.extract_adapter",
    "export.verify.verify_checkpoint",
    "sampling.generate.load_adapted",
}
MANY_PARAMETERS = KEYWORD_INTERFACES
LONG = {"export.checkpoint.export_checkpoint"}


def definitions() -> Iterator[tuple[str, ast.AST]]:
    """Every class and function of the package, with its module's name before its own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield f"{module.removesuffix('.__init__')}.{node.name}", node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Their number, without a method's own object."""
    args = function.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    names += ["*"] * ((args.vararg is not None) + (args.kwarg is not None))
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, node in definitions():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node


def test_functions_fit_on_a_screen() -> None:
    """60 lines, docstring and all."""
    long = {name for name, node in functions() if (node.end_lineno or 0) - node.lineno >= 60}
    assert long <= LONG


def test_signatures_are_short() -> None:
    """Eight parameters; what belongs together is an object."""
    many = {name for name, node in functions() if parameters(node) > 8}
    assert many <= MANY_PARAMETERS


def test_no_two_classes_have_one_name() -> None:
    homes = defaultdict(list)
    for name, node in definitions():
        if isinstance(node, ast.ClassDef):
            homes[node.name].append(name)
    twice = {name: places for name, places in homes.items() if len(places) > 1}
    assert not twice


def test_what_the_makefile_names_is_there() -> None:
    """A file that has moved would end the command that names it."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"\btests/[\w/.]*\w", text)
    assert len(named) > 20
    missing = [name for name in named if not name.endswith("_") and not (ROOT / name).exists()]
    assert not missing


def test_imports_make_no_circle() -> None:
    assert circles(imports(PACKAGE)) == []


def test_training_imports_none_of_the_rooms_beside_it() -> None:
    code = (
        "import pkgutil, importlib, sys, dora_diffusion.training as room\n"
        "for module in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "beside = ('gradio', 'ray', 'matplotlib.pyplot')\n"
        "beside += tuple(f'dora_diffusion.{name}' for name in ('cluster', 'studio', 'lab'))\n"
        "print([name for name in sys.modules if name.startswith(beside)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stdout.strip() == "[]"
