"""What a bug report must say of an installation, in one paste without secrets."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dora_diffusion import __version__
from dora_diffusion.console.anonymous import without_names
from dora_diffusion.console.packages import NOT_TRIED, ROOT, Package, ask, beside, packages
from dora_diffusion.console.tables import rows_text

# Variables that change what happens here, by how their names begin; and as whole names.
_PREFIXES = (
    "A1111_", "ACCELERATE_", "AMD_", "BNB_", "COMFYUI_", "CONDA_", "CUBLAS_", "CUDA_", "CUDNN_",
    "DIFFUSERS_", "DORA_DIFFUSION_", "GRADIO_", "HF_", "HIP_", "HSA_", "HUGGING", "KMP_", "MKL_",
    "NCCL_", "NVIDIA_", "OMP_", "PYTHON", "PYTORCH_", "ROCR_", "SAFETENSORS_", "SYCL_", "TORCH",
    "TRANSFORMERS_", "TRITON_", "VIRTUAL_ENV", "WANDB_", "XDG_CACHE", "XPU_", "ZE_",
)  # fmt: skip
_NAMES = (
    "ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "LD_LIBRARY_PATH", "LD_PRELOAD", "NO_PROXY",
    "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "THP_MEM_ALLOC_ENABLE", "TMPDIR",
    "TOKENIZERS_PARALLELISM",
)  # fmt: skip
# Of these the value is shown: switches, numbers and devices. Of all others only that they are set.
_SHOWN = (
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "DORA_DIFFUSION_DEBUG",
    "HF_HUB_DISABLE_SYMLINKS", "HF_HUB_DISABLE_XET", "HF_HUB_ENABLE_HF_TRANSFER", "HF_HUB_OFFLINE",
    "HIP_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION", "KMP_AFFINITY", "KMP_BLOCKTIME", "MKL_CBWR",
    "MKL_NUM_THREADS", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
    "PYTHONUTF8", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ENABLE_MPS_FALLBACK",
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO", "PYTORCH_MPS_LOW_WATERMARK_RATIO", "ROCR_VISIBLE_DEVICES",
    "THP_MEM_ALLOC_ENABLE", "TOKENIZERS_PARALLELISM", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRANSFORMERS_OFFLINE", "ZE_AFFINITY_MASK",
)  # fmt: skip
_SECONDS = 10


@dataclass(frozen=True)
class Environment:
    """What this package runs in; as text, a paste for a bug report.

    No token or password is in it, and no name of a home folder, of the user or of the machine.

    Attributes:
        facts: Version, Python, system, processor, memory and torch's build, by name.
        devices: The accelerators that torch can use.
        packages: What is required, and what extras bring.
        beside: Name and version of other packages that matter.
        problems: What is missing, too old, or cannot be imported.
        folders: Caches and results: where, and the free space there.
        variables: Environment variables with an effect; None for a value that is not shown.
    """

    facts: Mapping[str, str]
    devices: tuple[str, ...]
    packages: tuple[Package, ...]
    beside: tuple[str, ...]
    problems: tuple[str, ...]
    folders: Mapping[str, str]
    variables: Mapping[str, str | None]

    def __str__(self) -> str:
        """The rows of `dora-diffusion env`."""
        return rows_text(self._rows())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def _rows(self) -> list[tuple[str, str]]:
        rows = list(self.facts.items())
        rows += [("device", device) for device in self.devices or ["none but the processor"]]
        rows += [("PROBLEM", problem) for problem in self.problems]
        for extra in dict.fromkeys(package.extra for package in self.packages):
            name = f"extra {extra}" if extra else "packages"
            rows.append((name, _versions([p for p in self.packages if p.extra == extra])))
        rows += [("beside them", ", ".join(self.beside))] * bool(self.beside)
        rows += self.folders.items()
        rows += [
            ("variable", f"{name} is set" if value is None else f"{name}={value}")
            for name, value in self.variables.items()
        ]
        return rows


def describe_environment(runs_dir: str | Path = "runs") -> Environment:
    """What this package runs in: versions, machine, devices, extras, caches and settings.

    It answers also where a package is missing, or fails, ends Python or hangs when it is imported:
    that is tried in a process of its own, and takes some seconds.

    Args:
        runs_dir: The app's folder of runs.
    """
    found = packages()
    modules = {package.module: package for package in found if package.is_tried}
    answers = ask([*modules, "@build", "@cpu", "@devices", "@hub_cache"])
    says = {name: answer for name, (_, answer) in answers.items()}
    driver = _nvidia_driver()
    problems = [package.problem for package in found if package.problem]
    problems += [
        f"{package.name} {package.version} cannot be imported: {answers[module][0]}"
        for module, package in modules.items()
        if answers[module][0] not in ("", NOT_TRIED)
    ]
    if driver and says["@build"] == "the CPU":
        problems.append(
            "this torch is built for the CPU and cannot use the NVIDIA GPU: install the one for "
            "CUDA, as https://pytorch.org/get-started/locally shows"
        )
    facts = {
        "dora-diffusion": _own_version(),
        "Python": _python(),
        "system": _system(),
        "processor": ", ".join(part for part in (_processor(), says["@cpu"]) if part),
        "memory": _told(_memory),
        "torch for": says["@build"] or "unknown",
        "NVIDIA driver": driver,
    }
    folders = {
        "hub's cache": says["@hub_cache"] or "",
        "runs": str(Path(runs_dir).absolute()),
        "temporary files": tempfile.gettempdir(),
    }
    return Environment(
        {name: without_names(text) for name, text in facts.items() if text},
        ("unknown",) if says["@devices"] is None else tuple(says["@devices"]),
        tuple(found),
        tuple(beside()),
        tuple(map(without_names, problems)),
        {name: _folder(path) for name, path in folders.items() if path},
        _variables(),
    )


def _versions(found: list[Package]) -> str:
    if len(found) > 1 and all(package.version is None for package in found):
        return "none of " + ", ".join(package.name for package in found)
    return ", ".join(f"{p.name} {p.version or 'is not installed'}" for p in found)


def _told(question: Callable[[], str]) -> str:
    """An answer; whatever goes wrong is the answer too."""
    try:
        return question()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _output(*command: str) -> str:
    """What a program of the system says; empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, capture_output=True, timeout=_SECONDS, check=True, text=True,
            encoding="utf-8", errors="replace", env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        return done.stdout.strip()
    return ""


def _own_version() -> str:
    """With the commit, where this is a clone: its version is the same between releases."""
    if not (ROOT / ".git").exists():
        return __version__
    commit = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    return f"{__version__}, a clone" + (f" at {commit}" if commit else "")


def _python() -> str:
    kind = "no virtual environment"
    if (Path(sys.prefix) / "conda-meta").is_dir():
        kind = "conda"
    elif sys.prefix != sys.base_prefix:
        kind = "virtual environment"
    bits = 64 if sys.maxsize > 2**32 else 32
    name = platform.python_implementation()
    return f"{platform.python_version()}, {name}, {bits} bit, {kind}: {sys.executable}"


def _system() -> str:
    name = ""
    with contextlib.suppress(OSError):
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return f"{platform.platform()}{f', {name}' if name else ''}"


def _processor() -> str:
    """Name and cores, as the system's own program tells them."""
    name = _output("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else ""
    for line in _output("lscpu").splitlines():
        if line.startswith("Model name:"):
            name = line.partition(":")[2].strip()
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free"


def _nvidia_driver() -> str:
    """Driver, name and memory of NVIDIA's GPUs, by NVIDIA's program; whatever torch says."""
    fields = "driver_version,name,memory.total"
    answer = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return "; ".join(answer.splitlines())


def _folder(path: str) -> str:
    """A folder without names, and the space that is free there."""
    where = Path(os.path.realpath(path))
    there = next((p for p in (where, *where.parents) if p.is_dir()), where)
    try:
        free = f"{shutil.disk_usage(there).free / 2**30:.1f} GiB free"
    except OSError as error:
        free = str(error.strerror)
    return f"{without_names(str(where))}, {free}{'' if there == where else ', not there yet'}"


def _variables() -> dict[str, str | None]:
    """Those that are set and have an effect; the value only of those whose value is harmless."""
    found: dict[str, str | None] = {}
    for name in sorted(os.environ):
        known = name.upper()
        if known in _SHOWN:
            found[name] = without_names(os.environ[name])
        elif known in _NAMES or known.startswith(_PREFIXES):
            found[name] = None
    return found
