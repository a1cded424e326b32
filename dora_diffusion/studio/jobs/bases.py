"""Base models to train on: those of this package, released ones, and those found on this machine.

Looked at are the hub's cache (``HF_HOME``), the model folders of ComfyUI (``COMFYUI_PATH``) and
A1111 (``A1111_PATH``), and the folders that ``DORA_DIFFUSION_MODELS``, ``--model_folders`` or
``model_folders.txt`` in the runs folder name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dora_diffusion.config.families import FAMILIES
from dora_diffusion.formats.files.runs import PIPELINE_NAME
from dora_diffusion.models.embedded import MODELS
from dora_diffusion.models.locate import (
    EMBEDDED_PREFIX,
    cached_models,
    cached_snapshot,
    is_embedded,
    model_info,
)

FOLDERS_FILE = "model_folders.txt"
_TO_DOWNLOAD = "to be downloaded"
_MOST_FOUND = 60
_DEPTH = 2
# Where the programs keep whole models, below their own folder.
_PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "COMFYUI_PATH": ("models/checkpoints", "models/diffusers"),
    "A1111_PATH": ("models/Stable-diffusion",),
}


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
        """Name on the page."""
        title = FAMILIES[self.family].title if self.family else "family not known yet"
        path = Path(self.name)
        return f"{path.name if path.is_absolute() else self.name} · {title} · {self.where}"


def on_this_machine(models: Sequence[Base]) -> list[Base]:
    """Return those of `bases` that know photographs and need no download."""
    return [
        base
        for base in models
        if base.family and base.where != _TO_DOWNLOAD and not is_embedded(base.name)
    ]


def bases(workspace: Path, listed: Sequence[str], folders: Sequence[Path]) -> list[Base]:
    """Every base model to offer on this machine, the embedded ones first.

    Args:
        workspace: The runs folder, whose `FOLDERS_FILE` may name model folders, one a line.
        listed: Models that whoever started the app named.
        folders: Model folders that whoever started the app named.
    """
    models = [*named_bases(listed), *in_hub_cache(), *of_runs(workspace)]
    for folder, where in model_folders(os.environ, workspace, folders):
        models += in_folder(folder, where)
    models += [
        Base(family.released_id, family.name, _TO_DOWNLOAD)
        for family in FAMILIES.values()
        if family.is_suggested
    ]
    unique: dict[str, Base] = {}
    for base in models:
        unique.setdefault(base.name, base)
    return list(unique.values())


def named_bases(listed: Sequence[str]) -> list[Base]:
    """The embedded models, and those that whoever started the app named."""
    embedded = [_base(f"{EMBEDDED_PREFIX}{name}", "toy") for name in MODELS]
    return embedded + [_base(name, "named with --models") for name in listed]


def _base(name: str, where: str) -> Base:
    try:
        return Base(name, model_info(name).family, where)
    except ValueError:
        return Base(name, "", where)


def of_runs(workspace: Path) -> list[Base]:
    """The models that full fine-tuning made in the runs folder."""
    folders = sorted(workspace.glob(f"*/{PIPELINE_NAME}/model_index.json"))
    return [
        _base(str(index.parent), f"fine-tuned in run {index.parents[1].name}") for index in folders
    ]


def in_hub_cache() -> list[Base]:
    """Downloaded pipelines of a supported family, with the UNet's weights in safetensors."""
    cached = []
    for name in cached_models():
        snapshot = cached_snapshot(name)
        if snapshot is None or not any(snapshot.glob("unet/*.safetensors")):
            continue
        base = _base(name, "in the hub's cache")
        cached += [base] if base.family else []
    return cached


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
    models = (_base(str(path), where) for path in _candidates(folder, _DEPTH))
    return list(islice((base for base in models if base.family), _MOST_FOUND))


def _candidates(folder: Path, depth: int) -> Iterable[Path]:
    """Yield paths that may be models; links are followed to files, and not to folders."""
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
