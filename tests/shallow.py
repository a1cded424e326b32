"""The tiny pipelines with fewer levels and layers, for rooms that ask no module its name.

A conftest or a module that imports these fixtures has them in the place of the ones with the
released models' structure: what loads, trains, merges and samples the same way takes less than half
of the time on them. The fixtures `deep` and `shallow` give either kind by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = [
    "sd1_folder", "sd1_inpainting_folder", "sd2_folder", "sdxl_folder", "sdxl_inpainting_folder"
]  # fmt: skip


@pytest.fixture(scope="session")
def sd1_folder(shallow: Callable[[str], Path]) -> Path:
    """A tiny random Stable Diffusion 1 folder (epsilon prediction)."""
    return shallow("sd1")


@pytest.fixture(scope="session")
def sd2_folder(shallow: Callable[[str], Path]) -> Path:
    """A tiny random Stable Diffusion 2 folder (v prediction)."""
    return shallow("sd2")


@pytest.fixture(scope="session")
def sdxl_folder(shallow: Callable[[str], Path]) -> Path:
    """A tiny random SDXL folder (two text encoders, size and crop conditioning)."""
    return shallow("sdxl")


@pytest.fixture(scope="session")
def sd1_inpainting_folder(shallow: Callable[[str], Path]) -> Path:
    """A tiny random Stable Diffusion 1 inpainting folder: its UNet reads 9 channels."""
    return shallow("sd1-inpainting")


@pytest.fixture(scope="session")
def sdxl_inpainting_folder(shallow: Callable[[str], Path]) -> Path:
    """A tiny random SDXL inpainting folder: its UNet reads 9 channels."""
    return shallow("sdxl-inpainting")
