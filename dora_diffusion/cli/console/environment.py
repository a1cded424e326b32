"""Description of an installation for a bug report, in one paste without secrets."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from dora_diffusion import __version__
from dora_diffusion.cli.console.tables import rows_text

_ROOT = Path(__file__).parents[3]
_PROJECT = "dora-diffusion"
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[.*?\])?\s*([^;]*)(?:.*extra == ['\"]([\w-]+))?")
# For those who work on the package, or not needed: versions are told, nothing is imported.
_NOT_TRIED = ("test", "bare-test", "lint", "benchmarks", "none")
# What a package is imported as, where its name does not say it; of those that import nothing until
# they are asked, something that is used here.
_IMPORTED_AS = {
    "pillow": "PIL", "pyyaml": "yaml", "diffusers": "diffusers:StableDiffusionXLPipeline",
    "transformers": "transformers:CLIPTextModel", "tensorboard": "torch.utils.tensorboard",
}  # fmt: skip
_QUESTIONS = (
    "dora_diffusion.numerics.devices:built_for", "torch.backends.cpu:get_cpu_capability",
    "torch:get_num_threads", "dora_diffusion.numerics.devices:describe_accelerators",
    "huggingface_hub.constants:HF_HUB_CACHE",
)  # fmt: skip
# No requirements, but what breaks requirements where its version does not fit theirs.
_BESIDE = (
    "torchvision", "triton", "xformers", "tokenizers", "pydantic", "starlette", "fastapi", "hf-xet",
)  # fmt: skip
# Variables that change what happens here, by how their names begin.
_VARIABLES = re.compile(
    "A1111_|ACCELERATE_|AMD_|BNB_|COMFYUI_|CONDA_|CUBLAS_|CUDA_|CUDNN_|DIFFUSERS_|DORA_DIFFUSION_|"
    "GRADIO_|HF_|HIP_|HSA_|HUGGING|KMP_|LD_|MKL_|NCCL_|NVIDIA_|OMP_|PYTHON|PYTORCH_|ROCR_|"
    "SAFETENSORS_|SSL_CERT|SYCL_|THP_|TMPDIR|TOKENIZERS_|TORCH|TRANSFORMERS_|TRITON_|VIRTUAL_ENV|"
    "WANDB_|XDG_CACHE|XPU_|ZE_|REQUESTS_CA|(ALL|HTTPS?|NO)_PROXY"
)
# Of switches, numbers and devices the value is shown; of all others only that they are set.
_HARMLESS = re.compile(
    r"([a-z_]+:)?(true|false|on|off|yes|no|passive|active|fp16|bf16|[\d.,:-]*)", re.IGNORECASE
)
_SECRET = re.compile("TOKEN$|KEY|AUTH|SECRET|PASS", re.IGNORECASE)
_CASE = re.IGNORECASE if os.name == "nt" else re.RegexFlag(0)
_SECONDS, _IMPORT_SECONDS = 10, 180


@dataclass(frozen=True)
class Package:
    """A requirement, or what an extra brings: name, extra, bounds as in ``>=2.4``, and version."""

    name: str
    extra: str
    bounds: str
    version: str | None

    @property
    def problem(self) -> str:
        """Problem that shows without an import: a missing requirement, or a wrong version."""
        if self.version is None:
            return "" if self.extra else f"{self.name} is not installed"
        with contextlib.suppress(ImportError, ValueError):  # then nobody can say
            from packaging.specifiers import SpecifierSet

            if not SpecifierSet(self.bounds).contains(self.version, prereleases=True):
                return f"{self.name} {self.version} is installed, and {self.bounds} is needed"
        return ""


@dataclass(frozen=True)
class Environment:
    """Environment of this package; as text, a paste for a bug report.

    No token or password is in it, and no name of a home folder, of the user or of the machine.

    Attributes:
        facts: Version, Python, system, processor, memory and torch's build, by name.
        devices: The accelerators that torch can use.
        packages: What is required, what extras bring, and others that matter.
        problems: What is missing, too old, or cannot be imported.
        folders: Caches and results: where, and the free space there.
        variables: Environment variables with an effect; None for a value that is not shown.
    """

    facts: Mapping[str, str]
    devices: tuple[str, ...]
    packages: tuple[Package, ...]
    problems: tuple[str, ...]
    folders: Mapping[str, str]
    variables: Mapping[str, str | None]

    def __str__(self) -> str:
        """The rows of `dora-diffusion env`."""
        rows = list(self.facts.items())
        rows += [("device", device) for device in self.devices or ["none but the processor"]]
        rows += [("PROBLEM", problem) for problem in self.problems]
        for extra in dict.fromkeys(package.extra for package in self.packages):
            found = [p for p in self.packages if p.extra == extra]
            versions = ", ".join(f"{p.name} {p.version or 'is not installed'}" for p in found)
            rows.append((f"extra {extra}" if extra else "packages", versions))
        rows += self.folders.items()
        for name, value in self.variables.items():
            rows.append(("variable", f"{name} is set" if value is None else f"{name}={value}"))
        return rows_text(rows)


def describe_environment(runs_dir: str | Path = "runs") -> Environment:
    """Describe the environment: versions, machine, devices, extras, caches and settings.

    It answers also where a package is missing, or fails, ends Python or hangs when it is imported:
    that is tried in a process of its own, and takes some seconds. ``runs_dir`` is the app's.
    """
    found = packages()
    tried = {
        _IMPORTED_AS.get(package.name, package.name.replace("-", "_")): package
        for package in found
        if package.version and package.extra not in _NOT_TRIED
    }
    answers = ask([*tried, *_QUESTIONS])
    build, cpu, threads, devices, cache = (answers[name][1] for name in _QUESTIONS)
    problems = [package.problem for package in found if package.problem]
    problems += [
        f"{package.name} {package.version} cannot be imported: {answers[module][0]}"
        for module, package in tried.items()
        if answers[module][0]
    ]
    driver = _output("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    if driver and build == "the CPU":
        problems.append(
            "this torch is built for the CPU and cannot use the NVIDIA GPU: install the one for "
            "CUDA, as https://pytorch.org/get-started/locally shows"
        )
    # Its name as the system's own program tells it.
    told = re.search(r"(?<=Model name:).+", _output("lscpu"))
    name = told[0].strip() if told else _output("sysctl", "-n", "machdep.cpu.brand_string")
    name = name or platform.processor() or platform.machine()
    memory = "unknown (no psutil)"
    with contextlib.suppress(ImportError):
        from psutil import virtual_memory as now

        memory = f"{now().total / 2**30:.1f} GiB, {now().available / 2**30:.1f} GiB free"
    # Where this is a clone: its version is the same between releases.
    is_clone = (_ROOT / ".git").exists()
    commit = _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty") if is_clone else ""
    facts = {
        "dora-diffusion": f"{__version__} {commit}", "system": platform.platform(),
        "Python": f"{platform.python_version()}: {sys.executable}",
        "processor": f"{name}, {os.cpu_count()} cores, {cpu}, {threads} threads",
        "memory": memory, "torch for": build or "unknown",
        "NVIDIA driver": "; ".join(driver.splitlines()),
    }  # fmt: skip
    folders = {"hub's cache": cache, "runs": runs_dir, "temporary files": tempfile.gettempdir()}
    return Environment(
        {name: without_names(text) for name, text in facts.items() if text},
        ("unknown",) if devices is None else tuple(devices),
        tuple(found),
        tuple(map(without_names, problems)),
        {name: _folder(path) for name, path in folders.items() if path},
        {
            # The value only of those whose value is harmless.
            name: value if _HARMLESS.fullmatch(value) and not _SECRET.search(name) else None
            for name, value in sorted(os.environ.items())
            if _VARIABLES.match(name.upper())
        },
    )


def packages() -> list[Package]:
    """All requirements and those of the extras, as pip has recorded them, and what matters else."""
    found = []
    with contextlib.suppress(metadata.PackageNotFoundError):  # a clone that was not installed
        for line in metadata.requires(_PROJECT) or []:
            name, bounds, extra = _REQUIREMENT.match(line).groups()  # type: ignore[union-attr]
            # An extra may be other extras of this package; each of those is listed itself.
            if name != _PROJECT and not _is_of_older(line):
                found.append(Package(name, extra or "", bounds.strip(), _version(name)))
    beside = [(name, version) for name in _BESIDE if (version := _version(name))]
    return found + [Package(name, "none", "", version) for name, version in beside]


def _is_of_older(requirement: str) -> bool:
    """Return whether only Pythons older than this one need a requirement."""
    before = re.search(r"python_version\s*<\s*['\"]3\.(\d+)", requirement)
    return before is not None and sys.version_info >= (3, int(before[1]))


def _version(name: str) -> str | None:
    """A package's version, by pip's record."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def ask(names: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Import and answer names in another process, see `answer`; one that dies is replaced.

    Returns:
        By name: what went wrong, or an empty text, and the answer. After one that never answers
        the others are not tried.
    """
    answers: dict[str, tuple[str, Any]] = {}
    code = "from dora_diffusion.cli.console import environment; environment.answer()"
    while left := [name for name in names if name not in answers]:
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, *left], capture_output=True,
                stdin=subprocess.DEVNULL, timeout=_IMPORT_SECONDS, check=False,
            )  # fmt: skip
            printed, end = done.stdout, f"it ends Python, with exit code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            printed, end = error.stdout or b"", f"it does nothing for {_IMPORT_SECONDS} seconds"
            answers |= dict.fromkeys(left, ("", None))
        lines = printed.decode("utf-8", errors="replace").splitlines()
        answers |= {name: tuple(json.loads(line)) for name, line in zip(left, lines, strict=False)}
        answers |= dict.fromkeys(left[len(lines) :][:1], (end, None))
    return answers


def answer() -> None:
    """Print ``[problem, answer]`` for each name that this process was given."""
    # What libraries print while they are imported goes elsewhere.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for name in sys.argv[1:]:
            print(json.dumps(_answer(name)), file=answers, flush=True)


def _answer(name: str) -> tuple[str, Any]:
    module, _, attribute = name.partition(":")
    try:
        found = import_module(module)
        found = getattr(found, attribute) if attribute else found
        is_asked = name in _QUESTIONS
        return "", (found() if callable(found) else found) if is_asked else None
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}", None


def _output(*command: str) -> str:
    """Return the output of a system's program; empty where it is missing or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, capture_output=True, timeout=_SECONDS, check=True, text=True,
            encoding="utf-8", errors="replace", env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        return done.stdout.strip()
    return ""


def _folder(path: str | Path) -> str:
    """A folder without names, and the space that is free there."""
    where = Path(os.path.realpath(path))
    there = next((p for p in (where, *where.parents) if p.is_dir()), where)
    free = f"{shutil.disk_usage(there).free / 2**30:.1f} GiB free"
    return f"{without_names(str(where))}, {free}{'' if there == where else ', not there yet'}"


def without_names(text: str) -> str:
    """The text with ``~`` for the home folder, and other folders called as the user is hidden.

    Example:
        >>> without_names(f"{Path.home()}/models")
        '~/models'
    """
    home = Path(os.path.expanduser("~"))
    # A link first, then where it leads; not where it is the root of the disk.
    for path in (home, Path(os.path.realpath(home))):
        for form in {str(path), path.as_posix()} if path.parent != path else ():
            text = re.sub(rf"{re.escape(form)}(?![\w.-])", "~", text, flags=_CASE)
    names = {home.name, platform.node()}
    with contextlib.suppress(ImportError, KeyError, OSError):  # nobody knows this process's user
        names.add(getpass.getuser())
    for name in names - {""}:
        # As a part of a path only: some users are called as words of a sentence are.
        text = re.sub(rf"(?<=[/\\]){re.escape(name)}(?![\w.-])", "NAME", text, flags=_CASE)
    return text
