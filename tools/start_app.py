"""Install the package and open the app, for `start.bat` and `start.command`.

The environment is `.venv` beside them. The package is installed into it the first time, and again
when `pyproject.toml` is another one. Nothing is installed yet where this runs: it imports the
standard library alone.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ".venv"
# A copy of the pyproject.toml that was installed: times say nothing after unpacking an archive.
INSTALLED = "start-app-installed.toml"
PYTORCH = "https://download.pytorch.org/whl"
# What PyTorch's builds for CUDA 13.0 need: Turing (GTX 16, RTX 20) and a driver of this number.
# Older GPUs, and newer ones with an older driver, get the build for CUDA 12.6, which knows GPUs
# before Blackwell (compute capability 10).
_CUDA_13_CAPABILITY, _CUDA_13_DRIVER, _BLACKWELL = 7.5, 580.0, 10.0


class StartError(Exception):
    """The app cannot be started; says why and what to do."""


def main(arguments: Sequence[str] = ()) -> int:
    """Install what is not there yet, and open the app. Returns the exit code.

    Args:
        arguments: Further flags of ``dora-diffusion app``.
    """
    try:
        python = ready_environment(ROOT)
    except StartError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        return 1
    print("Opening the app. It runs until this window is closed.", flush=True)
    return _wait([str(python), "-m", "dora_diffusion", "app", "--browser", *arguments])


def ready_environment(root: Path) -> Path:
    """The Python of the environment, with the package installed as it is now.

    Raises:
        StartError: If there is none, and none can be made.
    """
    python = root / VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # A folder that was moved, or whose Python was removed, has an environment that does not run.
    if not _succeeds([str(python), "-m", "pip", "--version"]):
        _make(root)
    project = (root / "pyproject.toml").read_bytes()
    mark = root / VENV / INSTALLED
    if not mark.is_file() or mark.read_bytes() != project:
        _install(root, python)
        mark.write_bytes(project)
    return python


def _make(root: Path) -> None:
    print(f"Making an environment in {root / VENV}", flush=True)
    if _wait([sys.executable, "-m", "venv", "--clear", str(root / VENV)]):
        raise StartError(
            f"No environment could be made in {root / VENV}: the lines above say why. On Debian "
            "and Ubuntu, sudo apt install python3-venv helps; a folder that only others may write "
            "to has to be moved into your own."
        )


def _install(root: Path, python: Path) -> None:
    print(
        "Installing torch, Diffusers and the rest. The first time this takes minutes, and "
        "downloads up to some gigabytes.",
        flush=True,
    )
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    own = shlex.split(os.environ.get("PIP_ARGS", ""), posix=os.name != "nt")
    index = None if own else torch_index()
    steps = [[*pip, *own, "--editable", str(root)]]
    if index:
        print(f"torch comes from {index}", flush=True)
        # First, and from there alone: that of PyPI may have a higher number.
        steps.insert(0, [*pip, _torch(root), "--index-url", index])
        steps[-1] += ["--extra-index-url", index]
    for step in steps:
        if _wait(step):
            raise StartError(
                "The installation failed: the lines above say why. Is there a network, and space "
                "on the disk? Starting again continues it."
            )


def torch_index() -> str | None:
    """PyTorch's own index for this machine; None where PyPI's torch is the right one.

    PyPI's is for the CPU on Windows, for Apple's GPUs on macOS, and for NVIDIA's on Linux, where
    it comes with gigabytes that a machine without one has no use for.
    """
    if sys.platform == "darwin":
        return None
    gpus = _nvidia_gpus()
    if gpus is None:
        return None if sys.platform == "win32" else f"{PYTORCH}/cpu"
    capability, driver = gpus
    is_new = capability >= _BLACKWELL or (
        capability >= _CUDA_13_CAPABILITY and driver >= _CUDA_13_DRIVER
    )
    return f"{PYTORCH}/{'cu130' if is_new else 'cu126'}"


def _nvidia_gpus() -> tuple[float, float] | None:
    """Highest compute capability and the driver's number, zeros if unknown; None without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=compute_cap,driver_version", "--format=csv,noheader"]
    done = subprocess.run(
        query, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )
    found = re.findall(r"^\s*(\d+\.\d+)\s*,\s*(\d+\.\d+)", done.stdout, flags=re.MULTILINE)
    if not found:
        # A driver that runs but does not know the question is an old one.
        return (0.0, 0.0) if _succeeds(["nvidia-smi", "-L"]) else None
    return max((float(capability), float(driver)) for capability, driver in found)


def _torch(root: Path) -> str:
    """The requirement of torch, with its bounds."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'"(torch(?:[<>=!~][^"]*)?)"', text)
    return match[1] if match else "torch"


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _wait(command: list[str]) -> int:
    """Run a program to its end, also when Ctrl-C asks both to end. Returns its exit code."""
    with subprocess.Popen(command, cwd=ROOT) as program:
        while True:
            try:
                return program.wait()
            except KeyboardInterrupt:
                continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
