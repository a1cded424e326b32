"""Fixtures of the tests of formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.formats.adapter.file import (
    AdapterFile,
    AdapterMetadata,
)
from tests.formats.adapter.helpers import (
    MakeAdapter,
)


@pytest.fixture
def adapter(sd1_folder: Path, random_adapter: MakeAdapter) -> AdapterFile:
    layers = random_adapter(sd1_folder, every=7)
    return AdapterFile(layers, AdapterMetadata("sd1", "some/model", "sks dog", (512,)))
