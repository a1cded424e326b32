"""Base models to train on (embedded, released, or on this machine), and checks before a run.

Models are searched in the hub's cache (``HF_HOME``), the runs folder, and the folders of
``--model_folders``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dora_diffusion.config import TrainConfig, families
from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.exclusions import refuse
from dora_diffusion.config.pipeline_index import INDEXES, is_pipeline
from dora_diffusion.formats.files.runs import PIPELINE_NAME
from dora_diffusion.models import locate
from dora_diffusion.models.embedded import MODELS
from dora_diffusion.studio.jobs.store import UserError

_TO_DOWNLOAD = "to be downloaded"
_MOST_FOUND = 60
_DEPTH = 2
_UNKNOWN = "family not known yet"


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        name: Value of ``pretrained_model_name_or_path``.
        family: Name of its `Family`; ``""`` while unknown.
        where: Short description of its location.
    """

    name: str
    family: str
    where: str

    @property
    def label(self) -> str:
        """Name on the page."""
        title = families.FAMILIES[self.family].licensed_title if self.family else _UNKNOWN
        path = Path(self.name)
        return f"{path.name if path.is_absolute() else self.name} · {title} · {self.where}"


def bases(workspace: Path, listed: Sequence[str], folders: Sequence[Path]) -> list[Base]:
    """Return all base models to offer on this machine, the embedded ones first.

    Args:
        workspace: The runs folder.
        listed: Models of ``--models``.
        folders: Folders of ``--model_folders``.
    """
    models = [*named_bases(listed), *in_hub_cache(), *of_runs(workspace)]
    for folder in folders:
        models += in_folder(folder.expanduser())
    suggested = (family for family in families.FAMILIES.values() if family.is_suggested)
    models += [Base(family.released_id, family.name, _TO_DOWNLOAD) for family in suggested]
    unique: dict[str, Base] = {}
    for base in models:
        unique.setdefault(base.name, base)
    return list(unique.values())


def named_bases(listed: Sequence[str]) -> list[Base]:
    """Return the embedded models and the models of ``--models``."""
    embedded = [_base(f"{locate.EMBEDDED_PREFIX}{name}", "toy") for name in MODELS]
    return embedded + [_base(name, "named with --models") for name in listed]


def _base(name: str, where: str) -> Base:
    try:
        return Base(name, locate.model_info(name).family, where)
    except ValueError:
        return Base(name, "", where)


def of_runs(workspace: Path) -> list[Base]:
    """Return the fine-tuned models in the runs folder."""
    folders = filter(is_pipeline, sorted(workspace.glob(f"*/{PIPELINE_NAME}")))
    return [_base(str(folder), f"fine-tuned in run {folder.parent.name}") for folder in folders]


def in_hub_cache() -> list[Base]:
    """Return downloaded pipelines of a supported family with weights in safetensors."""
    cached = []
    for name in locate.cached_models():
        snapshot = locate.cached_snapshot(name)
        if snapshot is None or not weight_files(snapshot):
            continue
        base = _base(name, "in the hub's cache")
        cached += [base] if base.family else []
    return cached


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights of a pipeline's denoiser."""
    return [file for part in families.DENOISERS for file in folder.glob(f"{part}/*.safetensors")]


def in_folder(folder: Path) -> list[Base]:
    """Return the complete models in a folder: Diffusers folders and single files, no adapters."""
    models = (
        _base(str(path), "named with --model_folders") for path in _candidates(folder, _DEPTH)
    )
    return list(islice((base for base in models if base.family), _MOST_FOUND))


def _candidates(folder: Path, depth: int) -> Iterable[Path]:
    """Yield paths that may be models. Links to files are followed, links to folders are not."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_file() and entry.name.endswith(".safetensors"):
            yield Path(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            if is_pipeline(entry.path):
                yield Path(entry.path)
            elif depth > 1:
                yield from _candidates(Path(entry.path), depth - 1)


_CONFIGS = [*INDEXES, *(f"{part}/config.json" for part in families.DENOISERS)]


def check_base(name: str, revision: str | None = None, *, ask_hub: bool = False) -> None:
    """Check before a run that its base model exists and can be trained.

    Args:
        name: The model.
        revision: Revision of a hub id.
        ask_hub: Fetch the configuration from the hub if the model is not on this machine.

    Raises:
        UserError: If the model does not exist, or is of a kind that cannot be trained.
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
    is_here = locate.is_embedded(name) or path.exists()
    if not is_here and locate.looks_local(name):
        raise UserError(
            f"the base model {name} does not exist; choose a Diffusers folder, a .safetensors "
            "checkpoint or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    try:
        locate.model_info(name)
        if ask_hub and not is_here and locate.cached_snapshot(name) is None:
            families.detect_folder_family(locate.fetch_snapshot(name, revision, _CONFIGS, []))
    except (locate.ModelNotFoundError, families.UnsupportedModelError, OSError) as error:
        raise UserError(str(error)) from error


def check_variant(name: str, variant: str | None) -> None:
    """Check before a run that a folder has weights of a variant.

    Raises:
        UserError: If there are none, with the existing weights.
    """
    folder = locate.folder_of(name) if variant else None
    if folder is None:
        return
    files = sorted(path.name for path in weight_files(folder))
    if files and not any(f".{variant}." in file or f".{variant}-" in file for file in files):
        raise UserError(
            f"{name} has no weights of the variant {variant!r}; it has {', '.join(files[:3])}"
        )


def check_model(config: TrainConfig, *, ask_hub: bool = False) -> None:
    """Check before a run that its models and folders exist, and that the model fits its settings.

    Args:
        config: Settings of the run.
        ask_hub: Query the hub for models that are not on this machine.

    Raises:
        UserError: If one is missing, with the fix.
        ConfigError: If the model's family refuses a setting.
    """
    name = config.pretrained_model_name_or_path
    check_base(name, config.revision, ask_hub=ask_hub)
    family = families.FAMILIES.get(locate.model_info(name).family)
    if family is not None:
        refuse(config, family, name)
    if config.sample_model:
        check_base(config.sample_model, None, ask_hub=ask_hub)
    vae, folder = config.pretrained_vae_model_name_or_path, config.model_config
    if vae and locate.looks_local(vae) and not Path(vae).expanduser().exists():
        raise UserError(f"the VAE {vae} does not exist; give a folder, a file or a hub id")
    if folder and locate.looks_local(folder) and not is_pipeline(folder):
        raise UserError(
            f"model_config {folder} is not a Diffusers folder: it has no model_index.json"
        )
    classes = config.class_data_dir
    if classes and Path(classes).exists() and not Path(classes).is_dir():
        raise UserError(f"class_data_dir {classes} is a file; give a folder of class images")
    check_variant(name, config.variant)


def path_here(base: BaseModel) -> str | None:
    """Return a base model's path, or its folder in the hub's cache; None if it is not on disk.

    The hub is not queried.
    """
    from dora_diffusion.formats.checkpoint.models import PipelineFolder
    from dora_diffusion.formats.files.stream import TensorFileError

    name = str(base.path)
    if locate.is_embedded(name) or Path(name).expanduser().exists():
        return name
    try:
        folder = locate.resolve_folder(base, local_only=True)
        PipelineFolder(folder, base.variant)  # The cache may contain only the configuration.
    except (locate.ModelNotFoundError, TensorFileError):
        return None
    return str(folder)
