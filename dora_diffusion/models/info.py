"""A base model before it is loaded: what decides the settings that suit it.

Of a file only its header is read, and the hub is not asked.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_diffusion.config.families import (
    FAMILIES,
    USUAL,
    Family,
    UnsupportedModelError,
    detect_folder_family,
)
from dora_diffusion.formats.checkpoint.schedule import choose_schedule, stated_by_file
from dora_diffusion.models.locate import ModelNotFoundError, is_embedded, resolve_folder


@dataclass(frozen=True)
class ModelInfo:
    """Properties of a model that decide which settings suit it.

    Attributes:
        family: Name of its `Family`; ``""`` while it is not on this machine.
        resolution: Side in pixels that it trains at by default.
        has_released_shape: Whether it is as large as the released models of its family.
    """

    family: str
    resolution: int
    has_released_shape: bool


UNKNOWN = ModelInfo("", USUAL.default_resolution, False)


def model_info(name: str) -> ModelInfo:
    """Family, size and shape of a model, from its own files where they are on this machine.

    Raises:
        ModelNotFoundError, UnsupportedModelError: If it is on this machine and is not a model that
            can be trained.
    """
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return _file_info(path, path.stat().st_mtime_ns)
        folder = folder_of(name)
        if folder is not None:
            return _folder_info(folder, (folder / "model_index.json").stat().st_mtime_ns)
    except (ModelNotFoundError, UnsupportedModelError):
        raise
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{name} cannot be read as a model: {error}") from error
    released = (_released_info(each) for each in FAMILIES.values() if each.released_id == name)
    return next(released, UNKNOWN)


def _released_info(family: Family) -> ModelInfo:
    return ModelInfo(family.name, family.default_resolution, True)


def folder_of(name: str) -> Path | None:
    """The folder of a model that is on this machine."""
    if is_embedded(name) or Path(name).expanduser().is_dir():
        return resolve_folder(name)
    return cached_snapshot(name)


@functools.lru_cache(maxsize=256)
def _folder_info(folder: Path, modified: int) -> ModelInfo:
    family = detect_folder_family(folder)
    unet, vae = (_config(folder / part) for part in ("unet", "vae"))
    side = unet.get("sample_size")
    pixels = 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    widths = unet.get("block_out_channels", [320])
    return ModelInfo(
        family.name,
        side * pixels if isinstance(side, int) else family.default_resolution,
        widths[0] == 320,
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


@functools.lru_cache(maxsize=256)
def _file_info(path: Path, modified: int) -> ModelInfo:
    from dora_diffusion.formats.checkpoint.models import detect_checkpoint_family
    from dora_diffusion.formats.files.stream import read_header
    from dora_diffusion.models.configuration import released_config

    header = read_header(path)
    family = detect_checkpoint_family(header.specs, str(path))
    schedule = choose_schedule(path.name, stated_by_file(header.metadata, header.specs))
    side = released_config(family, schedule.prediction_type)["unet"]["sample_size"]
    return replace(_released_info(family), resolution=8 * side)


def hub_cache() -> Path:
    """Return the folder of the hub library's downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_models() -> list[str]:
    """Ids of the models that the hub's cache holds something of."""
    folders = sorted(hub_cache().glob("models--*"))
    return [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]


def cached_snapshot(name: str) -> Path | None:
    """The newest snapshot of a hub id in the cache that holds a whole pipeline's configuration."""
    folder = hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    whole = [path for path in folder.glob("*") if (path / "model_index.json").is_file()]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)
