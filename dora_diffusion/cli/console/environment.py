"""Examination of an installation: versions, problems and fixes, without secrets."""

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
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from dora_diffusion import __version__
from dora_diffusion.cli.console.output import rows_text
from dora_diffusion.config.arguments import check_arguments
from dora_diffusion.config.base import BaseModel

_ROOT = Path(__file__).parents[3]
_PROJECT = "dora-diffusion"
# Extras for developers, and packages that are not required: listed, but not imported.
_NOT_TRIED = ("test", "bare-test", "lint", "benchmarks", "none")
# Module names that differ from the package name; a name to import, for packages with lazy imports.
_IMPORTED_AS = {
    "pillow": "PIL", "pyyaml": "yaml", "diffusers": "diffusers:StableDiffusionXLPipeline",
    "transformers": "transformers:CLIPTextModel", "tensorboard": "torch.utils.tensorboard",
    "prodigy-plus-schedule-free": "prodigyplus",
}  # fmt: skip
_QUESTIONS = (
    "psutil:virtual_memory", "torch.utils.collect_env:get_env_info",
    "dora_diffusion.numerics.devices:built_for", "torch.backends.cpu:get_cpu_capability",
    "torch:get_num_threads", "dora_diffusion.numerics.devices:describe_accelerators",
    "huggingface_hub.constants:HF_HUB_CACHE",
)  # fmt: skip
# Packages that are not requirements, but break requirements if their versions do not fit.
_BESIDE = (
    "torchvision", "triton", "xformers", "tokenizers", "pydantic", "starlette", "fastapi", "hf-xet",
)  # fmt: skip
# Prefixes of environment variables that affect this package or its libraries.
_VARIABLES = re.compile(
    "A1111_|ACCELERATE_|AMD_|BNB_|COMFYUI_|CONDA_|CUBLAS_|CUDA_|CUDNN_|DIFFUSERS_|DORA_DIFFUSION_|"
    "GRADIO_|HF_|HIP_|HSA_|HUGGING|KMP_|LD_|MKL_|NCCL_|NVIDIA_|OMP_|PYTHON|PYTORCH_|ROCR_|"
    "SAFETENSORS_|SSL_CERT|SYCL_|THP_|TMPDIR|TOKENIZERS_|TORCH|TRANSFORMERS_|TRITON_|VIRTUAL_ENV|"
    "WANDB_|XDG_CACHE|XPU_|ZE_|REQUESTS_CA|(ALL|HTTPS?|NO)_PROXY"
)
# Values that may be shown: switches, numbers and devices. Other values are hidden.
_HARMLESS = re.compile(
    r"([a-z_]+:)?(true|false|on|off|yes|no|passive|active|fp16|bf16|[\d.,:-]*)", re.IGNORECASE
)
_SECRET = re.compile("TOKEN$|KEY|AUTH|SECRET|PASS", re.IGNORECASE)
_CASE = re.IGNORECASE if os.name == "nt" else re.RegexFlag(0)
_IMPORT_SECONDS = 180
_PACKAGES = "packages"
_TRIAL = "dora_diffusion.cli.console.trial"
_TRIALS = {f"{_TRIAL}:describe_device": "device", f"{_TRIAL}:train_and_sample": "training"}
# The newest versions that passed all tests; the oldest are the bounds in pyproject.toml.
_TESTED = {
    "torch": "2.13", "diffusers": "0.42", "transformers": "5.24", "accelerate": "1.15",
    "gradio": "6.31", "huggingface_hub": "2.4", "numpy": "2.4", "pillow": "12.3",
}  # fmt: skip
# Advice for using another folder.
_ELSEWHERE = {
    "hub's cache": "set HF_HOME to a folder of yours",
    "runs": "choose another folder with --runs_dir, and --output_dir of a run",
    "temporary files": "set TMPDIR to a folder of yours",
}
_LITTLE = 2**29
Answers = dict[str, tuple[str, Any]]


@dataclass(frozen=True)
class Package:
    """Requirement of the package or of an extra: name, extra, bounds (``>=2.4``) and version."""

    name: str
    extra: str
    bounds: str
    version: str | None

    @property
    def requirement(self) -> str:
        """The requirement as an argument of pip."""
        return f"'{self.name}{self.bounds}'"

    @property
    def findings(self) -> list[Finding]:
        """Findings without an import: missing, of a wrong version, or newer than tested."""
        mend = f"pip install {self.requirement}"
        if self.version is None:
            return [] if self.extra else [Finding(_PACKAGES, f"{self.name} is not installed", mend)]
        with contextlib.suppress(ImportError, ValueError):  # then versions are not compared
            from packaging.specifiers import SpecifierSet
            from packaging.version import Version

            if not SpecifierSet(self.bounds).contains(self.version, prereleases=True):
                reason = f"{self.name} {self.version} is installed, but {self.bounds} is needed"
                return [Finding(_PACKAGES, reason, mend)]
            tested = _TESTED.get(self.name)
            if tested and Version(self.version).release[:2] > Version(tested).release[:2]:
                reason = f"{self.name} {self.version} is newer than {tested}, the newest tested"
                mend = f"if something fails, pip install '{self.name}=={tested}.*'"
                return [Finding(_PACKAGES, reason, mend, fails=False)]
        return []


@dataclass(frozen=True)
class Finding:
    """Result of a check, and its fix.

    Attributes:
        check: Name of the check.
        found: Its result.
        mend: The fix; empty if nothing is wrong.
        fails: Whether something fails without the fix.
    """

    check: str
    found: str
    mend: str = ""
    fails: bool = True

    @property
    def state(self) -> str:
        """``"ok"``, ``"PROBLEM"``, or ``"note"`` if nothing fails."""
        return ("PROBLEM" if self.fails else "note") if self.mend else "ok"


@dataclass(frozen=True)
class Environment:
    """Environment of this package. Its text is meant for a bug report.

    It contains no token or password, and no name of a home folder, of the user or of the machine.

    Attributes:
        facts: Version, Python, system, processor, memory and torch's build, by name.
        devices: The accelerators that torch can use.
        packages: Requirements, packages of extras, and others that matter.
        findings: Results of the checks, with fixes.
        folders: Folders of caches and results, with their free space.
        variables: Environment variables with an effect; None for a hidden value.
    """

    facts: Mapping[str, str]
    devices: tuple[str, ...]
    packages: tuple[Package, ...]
    findings: tuple[Finding, ...]
    folders: Mapping[str, str]
    variables: Mapping[str, str | None]

    def __str__(self) -> str:
        """The rows of `dora-diffusion doctor`."""
        rows = list(self.facts.items())
        rows += [("device", device) for device in self.devices or ["none but the processor"]]
        for finding in self.findings:
            mend = f"; to fix it: {finding.mend}" if finding.mend else ""
            rows.append((finding.state, f"{finding.check}: {finding.found}{mend}"))
        for extra in dict.fromkeys(package.extra for package in self.packages):
            group = [p for p in self.packages if p.extra == extra]
            versions = ", ".join(f"{p.name} {p.version or 'is not installed'}" for p in group)
            rows.append((f"extra {extra}" if extra else "packages", versions))
        rows += self.folders.items()
        for name, value in self.variables.items():
            rows.append(("variable", f"{name} is set" if value is None else f"{name}={value}"))
        return rows_text(rows)


@check_arguments()
def describe_environment(
    runs_dir: str | PathLike[str] = "runs", base: BaseModel | None = None
) -> Environment:
    """Examine the environment: versions, machine, devices, folders, a base model, and one step.

    Packages are imported in another process, without network, which takes up to a minute. So the
    report is also made if a package is missing, or fails, hangs or ends Python when imported.

    Args:
        runs_dir: The app's folder, or another output folder of runs.
        base: A base model whose files are checked.
    """
    installed = packages()
    tried = {
        _IMPORTED_AS.get(package.name, package.name.replace("-", "_")): package
        for package in installed
        if package.version and package.extra not in _NOT_TRIED
    }
    model = "" if base is None else f"{_TRIAL}:check_components {json.dumps(asdict(base))}"
    answers = ask([*tried, *_QUESTIONS, *_TRIALS, *filter(None, [model])])
    *values, devices, cache = (answers[name][1] for name in _QUESTIONS)
    facts = _facts(*values)
    paths = {
        "hub's cache": cache,
        "runs": fspath(runs_dir),
        "temporary files": tempfile.gettempdir(),
    }
    folders = {name: _examine_folder(name, path) for name, path in paths.items() if path}
    findings = _of_packages(installed, tried, answers)
    if facts["NVIDIA driver"] and facts["torch for"] == "the CPU":
        mend = "install the one for CUDA, as https://pytorch.org/get-started/locally shows"
        unused = "this torch is built for the CPU and cannot use the NVIDIA GPU"
        findings.append(Finding("device", unused, mend))
    findings += [*_of_trials(answers), *(finding for _, finding in folders.values())]
    if base is not None:
        findings += _of_base(base, *answers[model])
    return Environment(
        {name: without_names(text) for name, text in facts.items() if text},
        ("unknown",) if devices is None else tuple(devices),
        tuple(installed),
        tuple(replace(f, found=without_names(f.found)) for f in findings),
        {name: text for name, (text, _) in folders.items()},
        {
            # Hide values that may be private.
            name: value if _HARMLESS.fullmatch(value) and not _SECRET.search(name) else None
            for name, value in sorted(os.environ.items())
            if _VARIABLES.match(name.upper())
        },
    )


def _facts(
    memory: Mapping[str, int] | None, system: Mapping[str, str] | None,
    build: str | None, cpu: str | None, threads: int | None,
) -> dict[str, str]:  # fmt: skip
    """Facts of this machine, from answers to `_QUESTIONS`; None where there is no answer."""
    size = "unknown (no psutil)"
    if memory is not None:
        total, available = (f"{memory[key] / 2**30:.1f} GiB" for key in ("total", "available"))
        size = f"{total}, {available} free"
    system = system or {}
    processor = system.get("cpu_info", "")  # on macOS the name alone
    if name := re.search(r"^(?:Model name|Name): *(.+)", processor, re.MULTILINE):
        processor = name[1]
    elif "\n" in processor or not processor:
        processor = platform.processor() or platform.machine()
    driver, gpus = (system.get(f"nvidia_{name}") or "" for name in ("driver_version", "gpu_models"))
    return {
        "dora-diffusion": f"{__version__} {_commit()}",
        "system": ", ".join(filter(None, [system.get("os"), platform.platform()])),
        "Python": f"{platform.python_version()}: {sys.executable}",
        "processor": f"{processor}, {os.cpu_count()} cores, {cpu}, {threads} threads",
        "memory": size, "torch for": build or "unknown",
        "NVIDIA driver": "; ".join(filter(None, [driver, *gpus.splitlines()])),
    }  # fmt: skip


def _commit() -> str:
    """Commit of a clone, whose version is the same between releases; empty for others."""
    folder = ["--git-dir", str(_ROOT / ".git"), "--work-tree", str(_ROOT)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(
            ["git", *folder, "describe", "--always", "--dirty"],
            stderr=subprocess.DEVNULL, timeout=10, encoding="utf-8",
        ).strip()  # fmt: skip
    return ""


def _of_packages(
    installed: Sequence[Package], tried: Mapping[str, Package], answers: Answers
) -> list[Finding]:
    findings = [finding for package in installed for finding in package.findings]
    for module, package in tried.items():
        if problem := answers[module][0]:
            what = f"{package.name} {package.version} cannot be imported: {problem}"
            mend = f"pip install --force-reinstall {package.requirement}"
            findings.append(Finding(_PACKAGES, what, mend))
    whole = f"all have matching versions and can be imported ({len(tried)})"
    return findings or [Finding(_PACKAGES, whole)]


def _of_trials(answers: Answers) -> list[Finding]:
    findings = []
    for name, check in _TRIALS.items():
        problem, result = answers[name]
        mend = "fix the problems above, or report this with all lines" if problem else ""
        findings.append(Finding(check, problem or result or "not tried", mend))
    return findings


def _of_base(base: BaseModel, problem: str, components: Mapping[str, str] | None) -> list[Finding]:
    """Return findings on a base model from the checks of its components, or from an error."""
    if components is None:
        kind, _, problem = problem.partition(": ")
        from dora_diffusion.models.locate import is_offline  # It imports the hub's library.

        if kind == "OfflineError" and not is_offline():  # `ask` set HF_HUB_OFFLINE.
            reason = f"{base.path} is not downloaded yet; `train` downloads it"
            return [Finding("base model", reason)]
        mend = "give a folder, a file, or a model that is in the hub's cache"
        return [Finding("base model", problem or "not tried", mend)]
    wrong = [
        Finding("base model", f"{part}: {text}", "download the model again, or give another one")
        for part, text in components.items()
        if text
    ]
    whole = f"{base.path} is whole: {', '.join(components)}"
    return wrong or [Finding("base model", whole)]


def _examine_folder(name: str, path: str | Path) -> tuple[str, Finding]:
    """Describe a folder, and check its nearest existing parent: write access and free space."""
    where, mend = Path(os.path.realpath(path)), _ELSEWHERE[name]
    there = next((p for p in (where, *where.parents) if p.exists()), where)
    free = shutil.disk_usage(there).free
    size = f"{free / 2**30:.1f} GiB free"
    finding = Finding(name, f"{there} can be written to")
    try:
        with tempfile.TemporaryFile(dir=there):
            if free < _LITTLE:
                finding = Finding(name, f"{there} has {size}", f"free some space, or {mend}")
    except OSError as error:
        reason = f"{there} cannot be written to: {error.strerror or error}"
        finding = Finding(name, reason, mend)
    missing = "" if there == where else ", not there yet"
    return f"{without_names(str(where))}, {size}{missing}", finding


def packages() -> list[Package]:
    """Return the requirements of the package and its extras, from pip's record, and `_BESIDE`."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [Package("packaging", "", "", None)]
    required = []
    with contextlib.suppress(metadata.PackageNotFoundError):  # a clone that was not installed
        extras = ["", *(metadata.metadata(_PROJECT).get_all("Provides-Extra") or [])]
        for requirement in map(Requirement, metadata.requires(_PROJECT) or []):
            name, marker = requirement.name, requirement.marker
            needing = (e for e in extras if marker is None or marker.evaluate({"extra": e}))
            extra = next(needing, None)  # None: for other systems or versions of Python
            # An extra may consist of other extras of this package, which are listed themselves.
            if name != _PROJECT and extra is not None:
                required.append(Package(name, extra, str(requirement.specifier), _version(name)))
    beside = [(name, version) for name in _BESIDE if (version := _version(name))]
    return required + [Package(name, "none", "", version) for name, version in beside]


def _version(name: str) -> str | None:
    """Return a package's version from pip's record; None if it is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def ask(names: Sequence[str]) -> Answers:
    """Import names in another process (see `answer`), and start a new one if it dies.

    Returns:
        For each name the error, or an empty text, and the answer. After a timeout the remaining
        names are not tried.
    """
    answers: Answers = {}
    code = "from dora_diffusion.cli.console import environment; environment.answer()"
    while left := [name for name in names if name not in answers]:
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, *left], capture_output=True,
                stdin=subprocess.DEVNULL, timeout=_IMPORT_SECONDS, check=False,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "LANGUAGE": "en"},
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
    """Print ``[problem, answer]`` for each name in this process's arguments."""
    # Redirect output of libraries during their import to stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for name in sys.argv[1:]:
            print(json.dumps(_answer(name)), file=answers, flush=True)


def _answer(name: str) -> tuple[str, Any]:
    target, _, argument = name.partition(" ")
    module, _, attribute = target.partition(":")
    arguments = [BaseModel(**json.loads(argument))] if argument else []
    try:
        value = import_module(module)
        value = getattr(value, attribute) if attribute else value
        if target not in _QUESTIONS and module != _TRIAL:
            return "", None
        value = value(*arguments) if callable(value) else value
        return "", value._asdict() if hasattr(value, "_asdict") else value
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}", None


def without_names(text: str) -> str:
    """Replace the home folder in a text by ``~``, and names of user and machine in paths.

    Example:
        >>> without_names(f"{Path.home()}/models")
        '~/models'
    """
    home = Path(os.path.expanduser("~"))
    # The link first, then its target, but never the root of the disk.
    for path in (home, Path(os.path.realpath(home))):
        for form in {str(path), path.as_posix()} if path.parent != path else ():
            text = re.sub(rf"{re.escape(form)}(?![\w.-])", "~", text, flags=_CASE)
    names = {home.name, platform.node()}
    with contextlib.suppress(ImportError, KeyError, OSError):  # this process's user has no name
        names.add(getpass.getuser())
    for name in names - {""}:
        # Only as a part of a path, since a user's name may also be an ordinary word.
        text = re.sub(rf"(?<=[/\\]){re.escape(name)}(?![\w.-])", "NAME", text, flags=_CASE)
    return text
