"""A base model before it is loaded: what is refused."""

from __future__ import annotations

from pathlib import Path

from dora_diffusion.config import TrainConfig
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import (
    UnsupportedModelError,
    detect_folder_family,
)
from dora_diffusion.models.locate import (
    HUB_ID,
    ModelNotFoundError,
    cached_snapshot,
    fetch_snapshot,
    folder_of,
    is_embedded,
    looks_local,
    model_info,
    resolve_folder,
)
from dora_diffusion.studio.jobs.workspace import UserError

_CONFIGS = ["model_index.json", "unet/config.json"]


def check_base(name: str, revision: str | None = None, *, ask_hub: bool = False) -> None:
    """Check before a run that its base model is there.

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
            f"{name} is not a model: choose a .safetensors checkpoint or a Diffusers folder"
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
    try:
        model_info(name)
        if is_here or not ask_hub:
            return
        detect_folder_family(fetch_snapshot(name, revision, _CONFIGS, []))
    except (ModelNotFoundError, UnsupportedModelError, OSError) as error:
        raise UserError(str(error)) from error


def check_variant(name: str, variant: str | None) -> None:
    """Check before a run that a folder has weights of a variant.

    Raises:
        UserError: With what there is.
    """
    folder = folder_of(name) if variant else None
    if folder is None:
        return
    files = sorted(path.name for path in folder.glob("unet/*.safetensors"))
    if files and not any(f".{variant}." in file or f".{variant}-" in file for file in files):
        raise UserError(
            f"{name} has no weights of the variant {variant!r}; its UNet is {', '.join(files[:3])}"
        )


def check_model(config: TrainConfig, *, ask_hub: bool = False) -> None:
    """Check before a run that a model, and the folders that it names, are there.

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
        raise UserError(
            f"model_config {folder} is not a Diffusers folder: it has no model_index.json"
        )
    classes = config.class_data_dir
    if classes and Path(classes).exists() and not Path(classes).is_dir():
        raise UserError(f"class_data_dir {classes} is a file; give a folder of class images")
    check_variant(config.pretrained_model_name_or_path, config.variant)


def path_here(base: BaseModel) -> str | None:
    """A base model's path, or its folder in the hub's cache; None where it is not on the disk.

    The hub is not asked.
    """
    from dora_diffusion.formats.checkpoint.models import PipelineFolder
    from dora_diffusion.formats.files.stream import TensorFileError

    name = str(base.path)
    if is_embedded(name) or Path(name).expanduser().exists():
        return name
    try:
        folder = resolve_folder(base, local_only=True)
        PipelineFolder(folder, base.variant)  # The cache may hold its configuration alone.
    except (ModelNotFoundError, TensorFileError):
        return None
    return str(folder)
