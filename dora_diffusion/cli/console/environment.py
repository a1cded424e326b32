"""Check of an installation: packages, machine, a base model, and one step of training."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from dora_diffusion import __version__
from dora_diffusion.cli.console.output import rows_text
from dora_diffusion.config.base import BaseModel

_PROJECT = "dora-diffusion"
_TORCH = "https://pytorch.org/get-started/locally"
# Lines about the processor that no report needs, and that are long.
_LEFT_OUT = ("Flags:", "Vulnerability ")


@dataclass(frozen=True)
class Finding:
    """Result of a check, and its fix; without a fix nothing is wrong."""

    check: str
    result: str
    fix: str = ""

    @property
    def state(self) -> str:
        """``"ok"`` or ``"PROBLEM"``."""
        return "PROBLEM" if self.fix else "ok"


@dataclass(frozen=True)
class Environment:
    """Packages, findings and machine. Its text is meant for a bug report, without secrets.

    Attributes:
        version: Version of this package.
        packages: Installed requirements, also of extras, with their versions.
        findings: Results of the checks, with fixes.
        system: Text of `torch.utils.collect_env`.
    """

    version: str
    packages: Mapping[str, str]
    findings: tuple[Finding, ...]
    system: str

    def __str__(self) -> str:
        """The rows of `dora-diffusion doctor`, and torch's text."""
        rows = [(_PROJECT, self.version)]
        for finding in self.findings:
            fix = f"; to fix it: {finding.fix}" if finding.fix else ""
            rows.append((finding.state, f"{finding.check}: {finding.result}{fix}"))
        versions = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        return f"{rows_text([*rows, ('packages', versions)])}\n\n{self.system}"


def describe_environment(base: BaseModel | None = None) -> Environment:
    """Check packages, device and a base model, and train the embedded model for one step.

    Args:
        base: A base model whose files are checked; a hub id in the hub's cache alone.
    """
    versions: dict[str, str] = {}
    system: list[str] = []
    checks: list[tuple[str, Callable[[], Iterator[Finding]], str]] = [
        ("packages", lambda: _check_packages(versions), "install this package with pip"),
        ("device", lambda: _check_device(system), f"install torch again, as {_TORCH} shows"),
        ("training", _check_training, "fix the problems above, or report this with all lines"),
    ]
    if base is not None:
        fix = "give a folder, a file, or a model that is in the hub's cache"
        checks.append(("base model", lambda: _check_base(base), fix))
    findings: list[Finding] = []
    for name, check, fix in checks:
        try:
            findings += check()
        except Exception as error:  # The other checks are reported too.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            findings.append(Finding(name, reason, fix))
    shown = (replace(finding, result=_without_home(finding.result)) for finding in findings)
    return Environment(__version__, versions, tuple(shown), _without_home("".join(system)))


def _without_home(text: str) -> str:
    return text.replace(str(Path.home()), "~")


def _check_packages(versions: dict[str, str]) -> Iterator[Finding]:
    """Compare installed packages with the requirements; fill in their versions."""
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, metadata.requires(_PROJECT) or []):
        name, marker = requirement.name, requirement.marker
        fix = f"pip install '{name}{requirement.specifier}'"
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if marker is None or marker.evaluate({"extra": ""}):
                wrong.append(Finding("packages", f"{name} is not installed", fix))
            continue
        if not requirement.specifier.contains(versions[name], prereleases=True):
            reason = f"{name} is {versions[name]}; {requirement.specifier} is needed"
            wrong.append(Finding("packages", reason, fix))
    yield from wrong or [Finding("packages", "all have matching versions")]


def _check_device(system: list[str]) -> Iterator[Finding]:
    """Describe the default device and its precisions; fill in torch's text about the machine."""
    from torch.utils.collect_env import get_env_info, pretty_str

    from dora_diffusion.models.precision import precision_of
    from dora_diffusion.numerics import devices

    info = get_env_info()
    lines = pretty_str(info).splitlines(keepends=True)
    system += [line for line in lines if not line.startswith(_LEFT_OUT)]
    kind = devices.default_device()
    free = devices.free_device_memory(kind) if devices.has_own_memory(kind) else None
    memory = "" if free is None else f", {free / 2**30:.1f} GiB free"
    precision = precision_of("auto").replace("no", "float32")
    result = f"{kind} ({devices.device_name(kind)}{memory}), which trains in {precision} by default"
    yield Finding("device", result)
    if info.nvidia_gpu_models and devices.accelerator() is None:
        fix = f"install the one for CUDA, as {_TORCH} shows"
        yield Finding("device", "this torch cannot use the NVIDIA GPU", fix)


def _check_training() -> Iterator[Finding]:
    """Train the embedded model for one step, and sample an image."""
    from dora_diffusion.config import TrainConfig
    from dora_diffusion.models.embedded import samples_folder
    from dora_diffusion.training.recipe import train

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = TrainConfig(
            instance_data_dir=samples_folder() / "bolt_mug",
            instance_prompt="a photo of a sks mug",
            max_train_steps=1,
            checkpointing_steps=1,
            num_validation_images=1,
            validation_inference_steps=1,
            output_dir=Path(folder) / "run",
        )
        size = train(config).samples["adapted"].stat().st_size
    seconds = time.perf_counter() - begun
    yield Finding("training", f"one step, and an image of {size} bytes, in {seconds:.1f} s")


def _check_base(base: BaseModel) -> Iterator[Finding]:
    """Check the files of a base model without loading them or reaching the hub."""
    from dora_diffusion.models.load import check_components
    from dora_diffusion.models.locate import folder_of, looks_local, resolve_folder

    name, path = "base model", os.path.expanduser(base.path)
    if not looks_local(path) and not os.path.exists(path):
        if folder_of(path) is None:
            yield Finding(name, f"{path} is not downloaded yet; `train` downloads it")
            return
        base = replace(base, path=resolve_folder(base, local_only=True))
    parts = check_components(base)
    wrong = {part: problem for part, problem in parts.items() if problem}
    for part, problem in wrong.items():
        fix = "download the model again, or give another one"
        yield Finding(name, f"{part}: {problem}", fix)
    if not wrong:
        yield Finding(name, f"{path} is complete: {', '.join(parts)}")
