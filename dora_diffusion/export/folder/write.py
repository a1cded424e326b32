"""A merged diffusers folder: configs and tokenizers copied, weights rewritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.export.card import read_card
from dora_diffusion.export.folder.plan import FolderPlan, Shard, dump
from dora_diffusion.export.merged import MergedModel, check_sample
from dora_diffusion.export.notes import Notes
from dora_diffusion.export.output import (
    OnProgress,
    ProgressReporter,
    check_space,
    replace_folder,
    temporary_sibling,
)
from dora_diffusion.formats.checkpoint.entries import Entry
from dora_diffusion.formats.files.atomic import save_text
from dora_diffusion.formats.files.stream import write_tensors


def write_folder(
    merged: MergedModel,
    plan: FolderPlan,
    output: Path,
    notes: Notes,
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
        save_text(temporary / "README.md", notes.card(read_card(plan.source)))
        for component, shards in plan.shards.items():
            _write_component(merged, component, shards, temporary / component, notes, report)
        _update(temporary / "scheduler" / "scheduler_config.json", plan.scheduler)
        _write_index(plan.index, temporary)
        replace_folder(temporary, output)


def _write_component(
    merged: MergedModel,
    component: str,
    shards: list[Shard],
    folder: Path,
    notes: Notes,
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
        write_tensors(target, specs, load, notes.draft(), notes.final, report.step)
        check_sample(target, [Entry(key, (name,)) for key, name in shard.items()], merged)
        places |= dict.fromkeys(shard, target.name)
        total += sum(spec.nbytes for spec in specs.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        save_text(folder / f"{_stem(component)}.safetensors.index.json", dump(index))
    if component != "vae" and merged.dtype is not None:
        _update_dtype(folder / "config.json", merged.dtype)


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
        save_text(config, dump({**json.loads(config.read_text("utf-8")), **values}))


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
    save_text(folder / "model_index.json", dump(index))


def _is_absent(folder: Path, name: str, value: list[object]) -> bool:
    return len(value) == 2 and value[0] is not None and not (folder / name).is_dir()
