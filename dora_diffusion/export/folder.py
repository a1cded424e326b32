"""A model written as a Diffusers folder: which file holds what, what is copied, and the writing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config.families import WEIGHT_COMPONENTS
from dora_diffusion.config.wording import listing
from dora_diffusion.export.files import (
    ExportError,
    OnProgress,
    ProgressReporter,
    check_space,
    replace_folder,
    temporary_sibling,
)
from dora_diffusion.export.merged import MergedModel, check_sample
from dora_diffusion.export.metadata import ModelMetadata
from dora_diffusion.formats.checkpoint.models import (
    WEIGHT_SUFFIXES,
    StoredModel,
    read_index,
    read_json,
)
from dora_diffusion.formats.checkpoint.schedule import (
    ZERO_SNR,
    Statement,
    choose_schedule,
    usual_of,
)
from dora_diffusion.formats.checkpoint.weights import UNET_PREFIX, VAE_PREFIX, Entry
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.files.stream import write_tensors
from dora_diffusion.formats.names.modules import BUFFERS, canonical
from dora_diffusion.models.schedulers import to_zero_snr

# One weight file: name of each tensor in it -> canonical name.
Shard = dict[str, str]
Shapes = Mapping[str, tuple[int, ...]]

WEIGHT_PREFIXES = (UNET_PREFIX, VAE_PREFIX, "cond_stage_model.", "conditioner.")
# Folders of Stable Diffusion 2 lack the last layer and the projection of its text encoder.
UNUSED = ("text_encoder.text_projection.", "text_encoder.text_model.encoder.layers.")


@dataclass(frozen=True)
class FolderPlan:
    """A Diffusers folder to write.

    Attributes:
        source: The folder whose other files (configs, tokenizers) it gets.
        others: These files.
        index: Its ``model_index.json``.
        shards: The weight files of each component.
        scheduler: Settings that the source's scheduler config does not have right.
    """

    source: Path
    others: list[Path]
    index: Mapping[str, Any]
    shards: dict[str, list[Shard]]
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        shards = (shard for files in self.shards.values() for shard in files)
        return [name for shard in shards for name in shard.values()]

    def with_tensors(self, component: str, names: Iterable[str]) -> FolderPlan:
        """The plan with one file for a component, holding these tensors."""
        shard = {name.removeprefix(f"{component}."): name for name in names}
        return replace(self, shards={**self.shards, component: [shard]})

    def with_schedule(self, settings: Mapping[str, Any]) -> FolderPlan:
        """The plan with these settings of the scheduler, by a class that can follow them."""
        if settings.get(ZERO_SNR):
            kind = read_json(self.source / "scheduler" / "scheduler_config.json")["_class_name"]
            settings = to_zero_snr({"_class_name": kind, **settings})
            scheduler = ["diffusers", settings["_class_name"]]
            return replace(self, scheduler=settings, index={**self.index, "scheduler": scheduler})
        return replace(self, scheduler=settings)


def plan_folder(model: StoredModel, config: str | Path | None) -> FolderPlan:
    """The folder that a model is written as.

    Args:
        model: A folder gives the same files, weights under their plain names.
        config: For a single file: a Diffusers folder with the configuration and tokenizers. None
            takes the released model's.

    Raises:
        ExportError: If a single file does not fit the configuration.
        ValueError: If none is given, and the file is of one of two released models.
    """
    if model.is_single_file:
        folder = configuration_folder(config, model)
        return plan_of_checkpoint(model, folder, shapes_of_configuration(folder))
    index = read_index(model.path)
    plan = FolderPlan(model.path, other_files(model.path, index), index, model.shards())
    return plan.with_schedule(model.restated)


def plan_of_checkpoint(checkpoint: StoredModel, config: Path, shapes: Shapes) -> FolderPlan:
    """A folder made from a single file.

    Args:
        checkpoint: The file.
        config: A Diffusers folder with the configuration and tokenizers.
        shapes: The tensors that models of this configuration have.

    Raises:
        ExportError: If the file lacks a tensor, has one of another shape, or one too many.
    """
    from dora_diffusion.models.configuration import is_released

    missing = [
        name
        for name, shape in shapes.items()
        if name not in checkpoint.specs or checkpoint.specs[name].shape != shape
    ]
    extra = [n for n in checkpoint.specs if n not in shapes and not n.startswith(UNUSED)]
    extra += [
        key
        for key in checkpoint.other_specs
        if key.startswith(WEIGHT_PREFIXES) and not key.endswith(BUFFERS) and ".loss." not in key
    ]
    if missing or extra:
        whose = "what the released model has" if is_released(config) else config
        raise ExportError(
            f"{whose} is the configuration of another model than {checkpoint.path.name}: "
            f"{listing(missing or extra, 3)} {'differ' if missing else 'would be left out'}; give "
            "a Diffusers folder of its shape with --model_config"
        )
    index = read_index(config)
    plan = FolderPlan(config, other_files(config, index), index, {})
    plan = plan.with_schedule(checkpoint.schedule())
    for component in WEIGHT_COMPONENTS:
        if names := [name for name in shapes if name.startswith(f"{component}.")]:
            plan = plan.with_tensors(component, names)
    return plan


def configuration_folder(config: str | Path | None, checkpoint: StoredModel) -> Path:
    """The folder with configuration and tokenizers: the given one, or the released model's.

    Raises:
        ValueError: If none is given, and the file is of one of two released models.
        ModelNotFoundError: If the given one is not there.
    """
    from dora_diffusion.models.configuration import released_folder, require_prediction
    from dora_diffusion.models.locate import resolve_folder

    if config is not None:
        return resolve_folder(config)
    said = [Statement("", checkpoint.schedule()), *usual_of(checkpoint.family)]
    schedule = choose_schedule(checkpoint.path.name, said)
    require_prediction(checkpoint.path.name, checkpoint.family, schedule)
    return released_folder(checkpoint.family, schedule.prediction_type)


def shapes_of_configuration(config: Path) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of all tensors that models of a configuration have."""
    from dora_diffusion.models.configuration import empty_module

    return {
        canonical(component, key): tuple(tensor.shape)
        for component, value in read_index(config).items()
        if component in WEIGHT_COMPONENTS and isinstance(value, list)
        for key, tensor in empty_module(config / component, value[1]).state_dict().items()
        if not key.endswith(BUFFERS)
    }


def other_files(folder: Path, index: Mapping[str, Any]) -> list[Path]:
    """The files of a pipeline that are copied as they are: all but the weights of components."""
    top = [file for file in folder.iterdir() if file.is_file() and not _is_weight(file)]
    files = [file for file in top if not file.name.startswith(".")]
    for name, value in index.items():
        if isinstance(value, list) and (folder / name).is_dir():
            inside = [file for file in (folder / name).rglob("*") if file.is_file()]
            files += [f for f in inside if name not in WEIGHT_COMPONENTS or not _is_weight(f)]
    return sorted(files)


def _is_weight(file: Path) -> bool:
    return file.name.endswith(WEIGHT_SUFFIXES) or ".safetensors.index." in file.name


def write_folder(
    merged: MergedModel,
    plan: FolderPlan,
    output: Path,
    metadata: ModelMetadata,
    on_progress: OnProgress | None,
    vae_config: Path | None = None,
) -> None:
    """Write a diffusers folder, atomically, and check it.

    Weights are written under their plain names, whatever variant they were read from; weights in
    other formats, and single files beside the components, hold the unmerged model and are left
    out. ``vae_config`` takes the place of the autoencoder's config.
    """
    written = sum(merged.specs[name].nbytes for name in plan.names)
    check_space(output, written + sum(file.stat().st_size for file in plan.others))
    report = ProgressReporter(written, on_progress)
    output = output.resolve()  # of a link, the folder that it leads to is replaced
    with temporary_sibling(output) as temporary:
        for file in plan.others:
            target = temporary / file.relative_to(plan.source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        if vae_config is not None:
            shutil.copyfile(vae_config, temporary / "vae" / "config.json")
        save_text(temporary / "README.md", metadata.card(_read_card(plan.source)))
        for component, shards in plan.shards.items():
            _write_component(merged, component, shards, temporary / component, metadata, report)
        _update(temporary / "scheduler" / "scheduler_config.json", plan.scheduler)
        _write_index(plan.index, temporary)
        replace_folder(temporary, output)


def _write_component(
    merged: MergedModel,
    component: str,
    shards: list[Shard],
    folder: Path,
    metadata: ModelMetadata,
    report: ProgressReporter,
) -> None:
    """Write the weight files of one component.

    Text encoders are written with ``text_model.``, which every version of transformers reads;
    without it, versions before 5.6 leave the whole encoder random, with a warning.
    """
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        specs = {key: merged.specs[name] for key, name in shard.items()}

        def load(key: str, shard: Shard = shard) -> Tensor:
            return merged[shard[key]]

        target = folder / _plain_name(component, number, len(shards))
        write_tensors(target, specs, load, metadata.draft(), metadata.final, report.step)
        check_sample(target, [Entry(key, (name,)) for key, name in shard.items()], merged)
        places |= dict.fromkeys(shard, target.name)
        total += sum(spec.nbytes for spec in specs.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        save_text(folder / f"{_stem(component)}.safetensors.index.json", _dump(index))
    if component != "vae" and merged.dtype is not None:
        _update_dtype(folder / "config.json", merged.dtype)


def _read_card(folder: Path) -> str:
    """The card of a model folder, empty if it has none that is text."""
    try:
        return (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _stem(component: str) -> str:
    return "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"


def _plain_name(component: str, number: int, count: int) -> str:
    shard = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
    return f"{_stem(component)}{shard}.safetensors"


def _update_dtype(config: Path, dtype: torch.dtype) -> None:
    """Keep a transformers config's note of its weights' dtype true."""
    if config.is_file():
        values = json.loads(config.read_text("utf-8"))
        noted = [key for key in ("dtype", "torch_dtype") if key in values]
        _update(config, dict.fromkeys(noted, str(dtype).removeprefix("torch.")))


def _update(config: Path, values: Mapping[str, Any]) -> None:
    if values:
        save_text(config, _dump({**json.loads(config.read_text("utf-8")), **values}))


def _write_index(source: Mapping[str, Any], folder: Path) -> None:
    """Write ``model_index.json`` without the components that the base folder does not hold.

    A download that leaves out the safety checker would otherwise give a folder that does not load.
    """
    index = {
        name: [None, None] if isinstance(value, list) and _is_absent(folder, name, value) else value
        for name, value in source.items()
    }
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    save_text(folder / "model_index.json", _dump(index))


def _is_absent(folder: Path, name: str, value: list[object]) -> bool:
    return len(value) == 2 and value[0] is not None and not (folder / name).is_dir()


def _dump(values: Mapping[str, Any]) -> str:
    """JSON as diffusers formats it."""
    return json.dumps(values, indent=2) + "\n"
