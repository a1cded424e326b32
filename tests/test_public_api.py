"""The public names: each is there, each documented example runs, and importing costs nothing."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import pydoc
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import dora_diffusion
from dora_diffusion.models.embedded import model_folder

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "PIL", "yaml", "diffusers", "transformers", "accelerate", "gradio")
PACKAGE = ROOT / "dora_diffusion"
HOMES = sorted({f"dora_diffusion.{home}" for home in dora_diffusion._HOMES.values()})


@pytest.mark.parametrize("name", dora_diffusion.__all__)
def test_every_name_resolves_and_is_documented(name):
    value = getattr(dora_diffusion, name)
    assert value.__name__ == name
    assert inspect.getdoc(value)


def test_the_names_are_those_with_a_home():
    assert list(dora_diffusion._HOMES) == dora_diffusion.__all__
    assert all(name in dora_diffusion.__doc__ for name in dora_diffusion.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'dora_diffusion' has no attribute 'nothing'"):
        _ = dora_diffusion.nothing
    code = "import dora_diffusion; dora_diffusion.inject_adapter"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.stderr.rstrip().endswith("Did you mean: 'inject_adapters'?")


def test_help_shows_names_signatures_and_docstrings():
    """Of a module in which no name has been used yet."""
    spec = importlib.util.spec_from_file_location("dora_diffusion", dora_diffusion.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    names, text = dir(fresh), pydoc.plain(pydoc.render_doc(fresh))
    assert not set(dora_diffusion.__all__) & set(vars(fresh))
    assert set(dora_diffusion.__all__) <= set(names)
    others = {name for name in names if name[0] != "_"} - set(dora_diffusion.__all__)
    assert all((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() for name in others)
    # From Python 3.13 on, a long signature has a line for each parameter.
    assert re.search(r"train\(\s*config: 'TrainConfig'", text)
    assert "class SamplingSettings(" in text
    assert inspect.getdoc(dora_diffusion.generate_images).partition("\n")[0] in text


def test_importing_imports_nothing_heavy():
    code = (
        "import sys, dora_diffusion\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])\n"
        "dora_diffusion.TrainConfig\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stdout.split() == []


def test_packages_import_their_names_when_they_are_used():
    packages = ["dora_diffusion", "dora_diffusion.config", "dora_diffusion.export"]
    code = (
        f"import sys, {', '.join(packages)}\n"
        "print(*[name for name in sys.modules if name.startswith('dora_diffusion')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert sorted(done.stdout.split()) == [*packages, "dora_diffusion.lazy"]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    """The module's documented examples, each with the module's and the public names at hand."""
    public = {name: getattr(dora_diffusion, name) for name in dora_diffusion.__all__}
    torch = {"torch": import_module("torch")}
    # Whose a function is, doctest decides by its globals, which a decorator changes.
    found = doctest.DocTestFinder(exclude_empty=True).find(
        module, module=False, globs=vars(module) | public | torch
    )

    def home(test: doctest.DocTest) -> str:
        name = test.name.removeprefix(f"{module.__name__}.").partition(".")[0]
        return getattr(vars(module).get(name), "__module__", module.__name__)

    return [test for test in found if test.examples and home(test) == module.__name__]


def test_every_public_name_with_an_example_is_found():
    found = {
        test.name.rpartition(".")[2] for home in HOMES for test in examples(import_module(home))
    }
    assert found >= {
        "AdapterConfig", "TrainConfig", "inject_adapters", "remove_adapters", "merge_adapters",
        "disabled", "save_adapter", "load_adapter", "train",
    }  # fmt: skip


@pytest.mark.parametrize("home", HOMES)
def test_documented_examples_run(home, tmp_path, monkeypatch):
    # Examples use paths of a checkout and write below the working directory.
    tests = examples(import_module(home))
    if any("samples/" in test.docstring for test in tests):
        if not (model_folder("tiny-sd") / "model_index.json").is_file():
            pytest.skip("the embedded model is not in this checkout")
        shutil.copytree(ROOT / "samples", tmp_path / "samples")
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
