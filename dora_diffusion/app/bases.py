"""Base models to train on: those of this package, released ones, and those found on this machine.

Looked at are the hub's cache (``HF_HOME``), the model folders of ComfyUI (``COMFYUI_PATH``) and
A1111 (``A1111_PATH``), and the folders that ``DORA_DIFFUSION_MODELS``, ``--model_folders`` or
``model_folders.txt`` in the runs folder name. Of a file only its header is read.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_diffusion.families import (
    FAMILIES,
    USUAL,
    Family,
    UnsupportedModelError,
    detect_folder_family,
)
from dora_diffusion.jobs.queue import is_small
from dora_diffusion.jobs.workspace import AppError
from dora_diffusion.models.locate import (
    EMBEDDED_PREFIX,
    HUB_ID,
    ModelNotFoundError,
    fetch_snapshot,
    looks_local,
    resolve_folder,
)
from dora_diffusion.toy import MODELS

FOLDERS_FILE = "model_folders.txt"
_TO_DOWNLOAD = "to be downloaded"
_MOST_FOUND = 60
_DEPTH = 2
# Where the programs keep whole models, below their own folder.
_PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "COMFYUI_PATH": ("models/checkpoints", "models/diffusers"),
    "A1111_PATH": ("models/Stable-diffusion",),
}
_CONFIGS = ["model_index.json", "unet/config.json"]


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        name: What ``pretrained_model_name_or_path`` is given.
        family: Name of its `Family`; ``""`` while it is not known.
        where: In a few words, where it is.
    """

    name: str
    family: str
    where: str

    @property
    def label(self) -> str:
        """What the page calls it."""
        title = FAMILIES[self.family].title if self.family else "family not known yet"
        path = Path(self.name)
        return f"{path.name if path.is_absolute() else self.name} · {title} · {self.where}"


@dataclass(frozen=True)
class Facts:
    """What of a model decides the settings that suit it.

    Attributes:
        family: Name of its `Family`; ``""`` while it is not on this machine.
        resolution: Side in pixels that it trains at by default.
        has_released_shape: Whether it is as large as the released models of its family.
    """

    family: str
    resolution: int
    has_released_shape: bool


UNKNOWN = Facts("", USUAL.default_resolution, False)


def facts_of(name: str) -> Facts:
    """Family, size and shape of a model, from its own files where they are on this machine.

    Raises:
        AppError: If it is on this machine and is no model that can be trained.
    """
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return _released_facts(_file_family(path, path.stat().st_mtime_ns))
        folder = _folder_of(name)
        if folder is not None:
            return _folder_facts(folder, (folder / "model_index.json").stat().st_mtime_ns)
    except (ModelNotFoundError, UnsupportedModelError) as error:
        raise AppError(str(error)) from error
    except (OSError, KeyError, ValueError) as error:
        raise AppError(f"{name} cannot be read as a model: {error}") from error
    released = (_released_facts(one) for one in FAMILIES.values() if one.released_id == name)
    return next(released, UNKNOWN)


def _released_facts(family: Family) -> Facts:
    return Facts(family.name, family.default_resolution, True)


def _folder_of(name: str) -> Path | None:
    """The folder of a model that is on this machine."""
    if is_small(name) or Path(name).expanduser().is_dir():
        return resolve_folder(name)
    return _cached_snapshot(name)


@functools.lru_cache(maxsize=256)
def _folder_facts(folder: Path, modified: int) -> Facts:
    family = detect_folder_family(folder)
    unet, vae = (_config(folder / part) for part in ("unet", "vae"))
    side = unet.get("sample_size")
    pixels = 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    widths = unet.get("block_out_channels", [320])
    return Facts(
        family.name,
        side * pixels if isinstance(side, int) else family.default_resolution,
        widths[0] == 320,
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


@functools.lru_cache(maxsize=256)
def _file_family(path: Path, modified: int) -> Family:
    from dora_diffusion.formats.checkpoint.file import detect_checkpoint_family
    from dora_diffusion.formats.files.header import read_header

    return detect_checkpoint_family(read_header(path).specs.keys(), str(path))


def check_base(name: str, revision: str | None = None, *, ask_hub: bool = False) -> None:
    """Say before a run that its base model is not there.

    Args:
        name: The model.
        revision: Of a hub id.
        ask_hub: Ask the hub for its configuration where it is not on this machine.

    Raises:
        AppError: If there is no such model, or it is of a kind that cannot be trained.
    """
    path = Path(name).expanduser()
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise AppError(
            f"{name} is a pickle, which can run code when opened; use its .safetensors version"
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise AppError(
            f"{name} is no model: choose a .safetensors checkpoint or a Diffusers folder"
        )
    if not is_small(name) and not path.exists() and (looks_local(name) or not HUB_ID.match(name)):
        raise AppError(
            f"the base model {name} does not exist; choose a Diffusers folder, a .safetensors "
            "checkpoint or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    is_here = is_small(name) or path.exists() or _cached_snapshot(name) is not None
    facts_of(name)
    if is_here or not ask_hub:
        return
    try:
        detect_folder_family(fetch_snapshot(name, revision, _CONFIGS, []))
    except (ModelNotFoundError, UnsupportedModelError, OSError) as error:
        raise AppError(str(error)) from error


def check_variant(name: str, variant: str | None) -> None:
    """Say before a run that a folder has no weights of a variant.

    Raises:
        AppError: With what there is.
    """
    folder = _folder_of(name) if variant else None
    if folder is None:
        return
    files = sorted(path.name for path in folder.glob("unet/*.safetensors"))
    if files and not any(f".{variant}." in file or f".{variant}-" in file for file in files):
        raise AppError(
            f"{name} has no weights of the variant {variant!r}; its UNet is {', '.join(files[:3])}"
        )


def on_this_machine(found: Sequence[Base]) -> list[Base]:
    """Of `bases`, those that know photographs and need no download."""
    return [
        base
        for base in found
        if base.family and base.where != _TO_DOWNLOAD and not is_small(base.name)
    ]


def bases(workspace: Path, listed: Sequence[str], folders: Sequence[Path]) -> list[Base]:
    """Every base model to offer on this machine, the embedded ones first.

    Args:
        workspace: The runs folder, whose `FOLDERS_FILE` may name model folders, one a line.
        listed: Models that whoever started the app named.
        folders: Model folders that whoever started the app named.
    """
    found = [*named_bases(listed), *in_hub_cache()]
    for folder, where in model_folders(os.environ, workspace, folders):
        found += in_folder(folder, where)
    found += [
        Base(family.released_id, family.name, _TO_DOWNLOAD)
        for family in FAMILIES.values()
        if family.is_suggested
    ]
    unique: dict[str, Base] = {}
    for base in found:
        unique.setdefault(base.name, base)
    return list(unique.values())


def named_bases(listed: Sequence[str]) -> list[Base]:
    """The embedded models, and those that whoever started the app named."""
    found = [_base(f"{EMBEDDED_PREFIX}{name}", "toy") for name in MODELS]
    return found + [_base(name, "named with --models") for name in listed]


def _base(name: str, where: str) -> Base:
    try:
        return Base(name, facts_of(name).family, where)
    except AppError:
        return Base(name, "", where)


def hub_cache() -> Path:
    """Where the hub library keeps what it has downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _cached_snapshot(name: str) -> Path | None:
    """The newest snapshot of a hub id in the cache that holds a whole pipeline's configuration."""
    folder = hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    whole = [path for path in folder.glob("*") if (path / "model_index.json").is_file()]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


def in_hub_cache() -> list[Base]:
    """Downloaded pipelines of a supported family, with the UNet's weights in safetensors."""
    found = []
    for folder in sorted(hub_cache().glob("models--*")):
        name = folder.name.removeprefix("models--").replace("--", "/")
        snapshot = _cached_snapshot(name)
        if snapshot is None or not any(snapshot.glob("unet/*.safetensors")):
            continue
        base = _base(name, "in the hub's cache")
        found += [base] if base.family else []
    return found


def model_folders(
    environment: Mapping[str, str], workspace: Path, named: Sequence[Path]
) -> list[tuple[Path, str]]:
    """Folders to look for models in, each with what to call it."""
    folders = [(folder, "named with --model_folders") for folder in named]
    for variable, parts in _PROGRAMS.items():
        if environment.get(variable):
            program = Path(environment[variable]).expanduser()
            folders += [(program / part, variable) for part in parts]
    listed = environment.get("DORA_DIFFUSION_MODELS", "").split(os.pathsep)
    folders += [(Path(line).expanduser(), "DORA_DIFFUSION_MODELS") for line in listed if line]
    file = workspace / FOLDERS_FILE
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        folders += [
            (Path(line.strip()).expanduser(), FOLDERS_FILE) for line in lines if line.strip()
        ]
    return [(folder, where) for folder, where in folders if folder.is_dir()]


def in_folder(folder: Path, where: str) -> list[Base]:
    """Whole models in a folder: Diffusers folders and single files; adapters and others are not."""
    found = (_base(str(path), where) for path in _candidates(folder, _DEPTH))
    known = (base for base in found if base.family)
    return [base for base, _ in zip(known, range(_MOST_FOUND), strict=False)]


def _candidates(folder: Path, depth: int) -> Iterable[Path]:
    """What may be a model; links are followed to files, and not to folders."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_file() and entry.name.endswith(".safetensors"):
            yield Path(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            if (Path(entry.path) / "model_index.json").is_file():
                yield Path(entry.path)
            elif depth > 1:
                yield from _candidates(Path(entry.path), depth - 1)
