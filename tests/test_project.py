"""The project around the code: its samples, its commands, its walks."""

from __future__ import annotations

import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dora_diffusion
from dora_diffusion.config import TrainConfig, read_config_file

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("samples/*/*.yaml")))
def test_sample_settings_are_valid(name):
    config = TrainConfig.from_dict(read_config_file(ROOT / "samples" / name / "config.yaml"))
    assert (ROOT / config.instance_data_dir).is_dir()


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
    """Dotted names under "Four walks" are modules of the package, or what they hold."""
    text = (ROOT / "docs" / "contributing" / "changes.md").read_text(encoding="utf-8")
    walks = text.partition("## Four walks")[2].partition("\n## ")[0]
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", walks)
    assert len(names) > 20
    for name in names:
        pkgutil.resolve_name(f"dora_diffusion.{name}")


@pytest.mark.slow
def test_training_imports_none_of_the_rooms_beside_it() -> None:
    """Nor do libraries for it; `make lint` proves that no module of ours does."""
    code = (
        "import pkgutil, importlib, sys, dora_diffusion.training as room\n"
        "for module in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "beside = ('gradio', 'ray', 'matplotlib.pyplot')\n"
        "beside += tuple(f'dora_diffusion.{name}' for name in ('cluster', 'studio', 'toy'))\n"
        "print([name for name in sys.modules if name.startswith(beside)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stdout.strip() == "[]"
