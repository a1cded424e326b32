"""The tiny pipelines with fewer levels and layers, for rooms that ask no module its name.

A conftest that imports these fixtures has them in the place of the ones with the released models'
structure: what loads, trains and samples the same way takes less than half of the time on them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import save_pipeline

__all__ = [
    "sd1_folder", "sd1_inpainting_folder", "sd2_folder", "sdxl_folder", "sdxl_inpainting_folder"
]  # fmt: skip


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion 1 folder (epsilon prediction)."""
    return save_pipeline(tmp_path_factory.mktemp("shallow") / "sd1", "sd1", shallow=True)


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion 2 folder (v prediction)."""
    return save_pipeline(tmp_path_factory.mktemp("shallow") / "sd2", "sd2", shallow=True)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SDXL folder (two text encoders, size and crop conditioning)."""
    return save_pipeline(tmp_path_factory.mktemp("shallow") / "sdxl", "sdxl", shallow=True)


@pytest.fixture(scope="session")
def sd1_inpainting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion 1 inpainting folder: its UNet reads 9 channels."""
    folder = tmp_path_factory.mktemp("shallow") / "sd1-inpainting"
    return save_pipeline(folder, "sd1", 9, shallow=True)


@pytest.fixture(scope="session")
def sdxl_inpainting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SDXL inpainting folder: its UNet reads 9 channels."""
    folder = tmp_path_factory.mktemp("shallow") / "sdxl-inpainting"
    return save_pipeline(folder, "sdxl", 9, shallow=True)
