"""Costs of required packages in an install: disk space, and processor time from pip's cache.

    python benchmarks/install_cost.py --without gradio

Installs all requirements of the package into a new environment, then all except one, each with what
it brings. The first install, which fills pip's cache, is not timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement


def install(without: str) -> tuple[int, float, int]:
    """Install into a new environment; returns packages, seconds and bytes."""
    lines = [line for line in requires("dora-diffusion") or () if "extra ==" not in line]
    wanted = [line for line in lines if Requirement(line).name != without]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        start = os.times()
        pip = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet", *wanted]
        subprocess.run(pip, check=True)
        end = os.times()
        seconds = end.children_user + end.children_system
        seconds -= start.children_user + start.children_system
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files if not path.is_symlink())
        return len([*Path(folder).glob("lib/python3*/site-packages/*.dist-info")]), seconds, size


def main() -> None:
    """Install, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without", nargs="*", default=["gradio"])
    names = parser.parse_args().without
    install("")
    print(f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}\n")
    print("| requirements | packages | on disk | install |\n|---|---|---|---|")
    for name in ("", *names):
        packages, seconds, size = install(name)
        label = f"without {name}" if name else "all"
        print(f"| {label} | {packages} | {size / 1e6:,.0f} MB | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
