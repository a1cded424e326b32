"""Fixtures of the tests of export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
    read_adapter,
    write_adapter,
)
from dora_diffusion.numerics.weights import LayerWeights
from tests.export.helpers import FAMILIES, MakeAdapter
from tests.shallow import *  # noqa: F403


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(family: str, deep: Callable[[str], Path]) -> Path:
    """A model whose keys are of every level and layer of the released ones."""
    return deep(family)


@pytest.fixture
def adapter(
    base: Path, family: str, tmp_path: Path, random_adapter: MakeAdapter
) -> tuple[Path, dict[str, LayerWeights]]:
    layers = random_adapter(base, axis="input" if family == "sd2" else "output", every=3)
    facts = AdapterMetadata(family=family, trigger="sks dog")
    path = write_adapter(tmp_path / "adapter.safetensors", AdapterFile(layers, facts), "kohya")
    return path, read_adapter(path).layers  # as read: the file's own rounding is not the export's


@pytest.fixture
def dora(tmp_path: Path, sd1_folder: Path, random_adapter: MakeAdapter) -> Path:
    """A DoRA of rank 4 and alpha 3."""
    layers = random_adapter(sd1_folder, every=9)
    return write_adapter(tmp_path / "dora", AdapterFile(layers, AdapterMetadata("sd1")))
