"""What is installed of what this package needs and can use, and what of that does not work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

NOT_TRIED = "not tried"
PROJECT = "dora-diffusion"
ROOT = Path(__file__).parents[2]
# For those who work on the package: their versions are told, and they are not imported.
_FOR_DEVELOPERS = ("test", "bare-test", "lint", "benchmarks")
# What a package is imported as, where its name does not say it; of those that import nothing until
# they are asked, something that is used here.
_IMPORTED_AS = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "diffusers": "diffusers:StableDiffusionXLPipeline",
    "transformers": "transformers:CLIPTextModel",
    "tensorboard": "torch.utils.tensorboard",
}
# No requirements, but what breaks requirements where its version does not fit theirs.
_BESIDE = (
    "torchvision", "triton", "xformers", "tokenizers", "pydantic", "starlette", "fastapi", "hf-xet",
)  # fmt: skip
_TIMEOUT = 180


@dataclass(frozen=True)
class Package:
    """A package that is required, or that an extra brings.

    Attributes:
        name: As pip knows it.
        extra: The extra that brings it; empty for a requirement.
        bounds: The versions that are asked for, as in ``>=2.4``.
        version: The one that is installed; None where none is.
    """

    name: str
    extra: str
    bounds: str
    version: str | None

    @property
    def is_tried(self) -> bool:
        """Whether it is imported to see if it works."""
        return self.version is not None and self.extra not in _FOR_DEVELOPERS

    @property
    def module(self) -> str:
        """What `ask` imports to see whether it works."""
        return _IMPORTED_AS.get(self.name, self.name.replace("-", "_"))

    @property
    def problem(self) -> str:
        """What can be seen without importing it: a requirement missing, or a wrong version."""
        if self.version is None:
            return "" if self.extra else f"{self.name} is not installed"
        if _is_within(self.version, self.bounds):
            return ""
        return f"{self.name} {self.version} is installed, and {self.bounds} is needed"


def packages() -> list[Package]:
    """All requirements, and those of the extras, by the clone's pyproject.toml or by pip."""
    project = ROOT / "pyproject.toml"
    lines = _of_clone(project) if project.is_file() else metadata.requires(PROJECT) or []
    # An extra that is made of others requires the project itself.
    return [package for line in lines if (package := _package(line)).name != PROJECT]


def beside() -> list[str]:
    """Name and version of what else is installed that matters."""
    versions = [(name, installed_version(name)) for name in _BESIDE]
    return [f"{name} {version}" for name, version in versions if version]


def installed_version(name: str) -> str | None:
    """A package's version, by pip's record."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def ask(names: Sequence[str], timeout: float = _TIMEOUT) -> dict[str, tuple[str, Any]]:
    """Have another process answer (see `dora_diffusion.console.probe`); one that dies is replaced.

    Returns:
        By name: what went wrong, or an empty text, and the answer. After one that never answers
        the others are `NOT_TRIED`.
    """
    answers: dict[str, tuple[str, Any]] = {}
    while left := [name for name in names if name not in answers]:
        command = [sys.executable, "-m", "dora_diffusion.console.probe", *left]
        try:
            done = subprocess.run(
                command, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout, check=False
            )
            lines, end = _lines(done.stdout), f"it ends Python, with exit code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            lines, end = _lines(error.stdout), f"it does nothing for {timeout:g} seconds"
            # The others would wait for the same, most likely.
            answers |= dict.fromkeys(left[len(lines) + 1 :], (NOT_TRIED, None))
        answers |= {name: tuple(json.loads(line)) for name, line in zip(left, lines, strict=False)}
        answers |= dict.fromkeys(left[len(lines) :][:1], (end, None))
    return answers


def _lines(printed: bytes | None) -> list[str]:
    return (printed or b"").decode("utf-8", errors="replace").splitlines()


def _of_clone(project: Path) -> Iterable[str]:
    """Requirements as in a wheel's metadata. (Python 3.10 has no reader of TOML.)"""
    text = project.read_text(encoding="utf-8")
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    required = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    for extra, listed in [
        ("", required[1] if required else ""),
        *re.findall(r"^([\w-]+) = \[(.*?)\]$", extras, re.DOTALL | re.MULTILINE),
    ]:
        for requirement in re.findall(r'"([^"]+)"', listed):
            yield f"{requirement}; extra == '{extra}'" if extra else requirement


def _package(requirement: str) -> Package:
    match = re.match(r"([\w.-]+)(?:\[.*?\])?\s*([^;]*)", requirement)
    extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
    name, bounds = match.groups() if match else (requirement, "")
    return Package(name, extra[1] if extra else "", bounds.strip(), installed_version(name))


def _is_within(version: str, bounds: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(bounds).contains(version, prereleases=True)
    except (ImportError, ValueError):  # then nobody can say
        return True
