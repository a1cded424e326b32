"""Libraries that pyproject.toml requires, always or by an extra."""

from __future__ import annotations

import ast
import re

from packaging.requirements import Requirement

from tools.rules.sources import ROOT

# Their names in Python, where the registry has another.
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "prodigy-plus-schedule-free": "prodigyplus"}
# Installed by hand, and in no extra: a tracker with accounts.
BY_HAND = ("wandb",)
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def import_names(requirements: list[str]) -> set[str]:
    """Names in Python of what is required."""
    names = [Requirement(requirement).name for requirement in requirements]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def stated(field: str) -> list[str]:
    """A list of requirements in pyproject.toml."""
    (lines,) = re.findall(rf"^{field} = (\[.*?\])$", PROJECT, re.MULTILINE | re.DOTALL)
    requirements: list[str] = ast.literal_eval(lines)
    return requirements


def all_extras() -> list[str]:
    """Names of the optional lists of pyproject.toml."""
    section = PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)


DEVELOPERS = {"bare-test", "benchmarks", "docs", "lab", "lint", "test"}
"""Extras of who changes the package."""
EXTRAS = {*all_extras()} - DEVELOPERS
REQUIRED = import_names(stated("dependencies"))
OPTIONAL = import_names([*BY_HAND, *(line for extra in sorted(EXTRAS) for line in stated(extra))])
