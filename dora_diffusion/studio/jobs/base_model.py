"""A base model before it is loaded: what decides the settings that suit it, and what is refused.

Of a file only its header is read.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import (
    FAMILIES,
    USUAL,
    Family,
    UnsupportedModelError,
    detect_folder_family,
)
from dora_diffusion.formats.checkpoint.schedule import (
    choose_schedule,
    stated_by_file,
)
from dora_diffusion.models.locate import (
    HUB_ID,
    ModelNotFoundError,
    fetch_snapshot,
    is_embedded,
    looks_local,
    resolve_folder,
)
from dora_diffusion.studio.jobs.workspace import UserError

_CONFIGS = ["model_index.json", "unet/config.json"]


@dataclass(frozen=True)
class ModelInfo:
    """What of a model decides the settings that suit it.

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
        UserError: If it is on this machine and is no model that can be trained.
    """
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return _file_info(path, path.stat().st_mtime_ns)
        folder = _folder_of(name)
        if folder is not None:
            return _folder_info(folder, (folder / "model_index.json").stat().st_mtime_ns)
    except (ModelNotFoundError, UnsupportedModelError) as error:
        raise UserError(str(error)) from error
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be read as a model: {error}") from error
    released = (_released_info(each) for each in FAMILIES.values() if each.released_id == name)
    return next(released, UNKNOWN)


def _released_info(family: Family) -> ModelInfo:
    return ModelInfo(family.name, family.default_resolution, True)


def _folder_of(name: str) -> Path | None:
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
    from dora_diffusion.formats.checkpoint.file import detect_checkpoint_family
    from dora_diffusion.formats.files.header import read_header
    from dora_diffusion.models.configuration import released_config

    header = read_header(path)
    family = detect_checkpoint_family(header.specs, str(path))
    schedule = choose_schedule(path.name, stated_by_file(header.metadata, header.specs))
    side = released_config(family, schedule.prediction_type)["unet"]["sample_size"]
    return replace(_released_info(family), resolution=8 * side)


def check_base(name: str, revision: str | None = None, *, ask_hub: bool = False) -> None:
    """Say before a run that its base model is not there.

    Args:
        name: The model.
        revision: Of a hub id.
        ask_hub: Ask the hub for its configuration where it is not on this machine.

    Raises:
        UserError: If there is no such model, or it is of a kind that cannot be trained.
    """
    path = Path(name).expanduser()
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(
            f"{name} is a pickle, which can run code when opened; use its .safetensors version"
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(
            f"{name} is no model: choose a .safetensors checkpoint or a Diffusers folder"
        )
    if (
        not is_embedded(name)
        and not path.exists()
        and (looks_local(name) or not HUB_ID.match(name))
    ):
        raise UserError(
            f"the base model {name} does not exist; choose a Diffusers folder, a .safetensors "
            "checkpoint or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    is_here = is_embedded(name) or path.exists() or cached_snapshot(name) is not None
    model_info(name)
    if is_here or not ask_hub:
        return
    try:
        detect_folder_family(fetch_snapshot(name, revision, _CONFIGS, []))
    except (ModelNotFoundError, UnsupportedModelError, OSError) as error:
        raise UserError(str(error)) from error


def check_variant(name: str, variant: str | None) -> None:
    """Say before a run that a folder has no weights of a variant.

    Raises:
        UserError: With what there is.
    """
    folder = _folder_of(name) if variant else None
    if folder is None:
        return
    files = sorted(path.name for path in folder.glob("unet/*.safetensors"))
    if files and not any(f".{variant}." in file or f".{variant}-" in file for file in files):
        raise UserError(
            f"{name} has no weights of the variant {variant!r}; its UNet is {', '.join(files[:3])}"
        )


def check_model(config: TrainConfig, *, ask_hub: bool = False) -> None:
    """Say before a run that a model, or a folder that it names, is not there.

    Args:
        config: The settings.
        ask_hub: Ask the hub for models that are not on this machine.

    Raises:
        UserError: What is missing, and what to do.
    """
    check_base(config.pretrained_model_name_or_path, config.revision, ask_hub=ask_hub)
    vae, folder = config.pretrained_vae_model_name_or_path, config.model_config
    if vae and looks_local(vae) and not Path(vae).expanduser().exists():
        raise UserError(f"the VAE {vae} does not exist; give a folder, a file or a hub id")
    if folder and looks_local(folder) and not Path(folder, "model_index.json").is_file():
        raise UserError(f"model_config {folder} is no Diffusers folder: it has no model_index.json")
    classes = config.class_data_dir
    if classes and Path(classes).exists() and not Path(classes).is_dir():
        raise UserError(f"class_data_dir {classes} is a file; give a folder of class images")
    check_variant(config.pretrained_model_name_or_path, config.variant)


def path_here(base: BaseModel) -> str | None:
    """A base model's path, or its folder in the hub's cache; None where it is not on the disk.

    The hub is not asked.
    """
    from dora_diffusion.formats.checkpoint.folder import PipelineFolder
    from dora_diffusion.formats.files.header import TensorFileError

    name = str(base.path)
    if is_embedded(name) or Path(name).expanduser().exists():
        return name
    try:
        folder = resolve_folder(base, local_only=True)
        PipelineFolder(folder, base.variant)  # The cache may hold its configuration alone.
    except (ModelNotFoundError, TensorFileError):
        return None
    return str(folder)


def hub_cache() -> Path:
    """Where the hub library keeps what it has downloaded."""
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
