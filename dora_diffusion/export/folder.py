"""A merged diffusers folder: the base's files, with the weights of its components rewritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.export.merged import MergedModel, check_sample
from dora_diffusion.export.output import (
    OnProgress,
    ProgressReporter,
    check_space,
    replace_folder,
    temporary_sibling,
)
from dora_diffusion.formats.checkpoint_keys import Entry
from dora_diffusion.formats.pipeline_folder import (
    WEIGHT_SUFFIXES,
    PipelineFolder,
    canonical_tensor,
)
from dora_diffusion.formats.safetensors_stream import save_text, write_tensors


def write_folder(
    merged: MergedModel,
    pipeline: PipelineFolder,
    output: Path,
    metadata: Mapping[str, str],
    on_progress: OnProgress | None,
) -> None:
    """Write a diffusers folder, atomically, and check it.

    Weights are written under their plain names, whatever variant they were read from; weights in
    other formats, and single files beside the components, hold the unmerged model and are left
    out.
    """
    others = other_files(pipeline)
    written = sum(merged.spec(name).nbytes for name in pipeline.specs)
    check_space(output, written + sum(file.stat().st_size for file in others))
    report = ProgressReporter(len(pipeline.specs), on_progress)
    with temporary_sibling(output) as temporary:
        for file in others:
            target = temporary / file.relative_to(pipeline.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        for component in pipeline.readers:
            _write_component(merged, pipeline, component, temporary / component, metadata, report)
        _write_index(pipeline, temporary)
        replace_folder(temporary, output)


def _write_component(
    merged: MergedModel,
    pipeline: PipelineFolder,
    component: str,
    folder: Path,
    metadata: Mapping[str, str],
    report: ProgressReporter,
) -> None:
    reader = pipeline.readers[component]
    # Text encoders are written with `text_model.`, which every version of transformers reads;
    # without it, versions before 5.6 leave the whole encoder random, with a warning.
    canonical = {key: canonical_tensor(component, key) for key in reader.specs}
    names = {name.removeprefix(f"{component}."): name for name in canonical.values()}
    files = {
        name.removeprefix(f"{component}."): reader.file_of[key] for key, name in canonical.items()
    }

    def load(key: str) -> Tensor:
        report.step()
        return merged.tensor(names[key])

    places: dict[str, str] = {}
    for number, file in enumerate(reader.files, start=1):
        keys = [key for key in names if files[key] == file]
        target = folder / _plain_name(component, number, len(reader.files))
        write_tensors(target, {key: merged.spec(names[key]) for key in keys}, load, metadata)
        check_sample(target, [Entry(key, (names[key],)) for key in keys], merged)
        places |= dict.fromkeys(keys, target.name)
    if len(reader.files) > 1:
        total = sum(merged.spec(name).nbytes for name in names.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
        save_text(folder / f"{_stem(component)}.safetensors.index.json", text + "\n")
    _update_dtype(folder / "config.json", merged.dtype if component != "vae" else None)


def _stem(component: str) -> str:
    return "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"


def _plain_name(component: str, number: int, count: int) -> str:
    shard = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
    return f"{_stem(component)}{shard}.safetensors"


def _update_dtype(config: Path, dtype: torch.dtype | None) -> None:
    """Keep a transformers config's note of its weights' dtype true."""
    if dtype is None or not config.is_file():
        return
    values = json.loads(config.read_text("utf-8"))
    noted = [key for key in ("dtype", "torch_dtype") if key in values]
    if noted:
        values |= dict.fromkeys(noted, str(dtype).removeprefix("torch."))
        save_text(config, json.dumps(values, indent=2) + "\n")


def other_files(pipeline: PipelineFolder) -> list[Path]:
    """The files of a pipeline that are copied as they are: all but the weights of components."""
    top = [file for file in pipeline.path.iterdir() if file.is_file() and not _is_weight(file)]
    files = [file for file in top if not file.name.startswith(".")]
    for name, value in pipeline.index.items():
        if isinstance(value, list) and (pipeline.path / name).is_dir():
            inside = [file for file in (pipeline.path / name).rglob("*") if file.is_file()]
            files += [f for f in inside if name not in pipeline.readers or not _is_weight(f)]
    return sorted(files)


def _is_weight(file: Path) -> bool:
    return file.name.endswith(WEIGHT_SUFFIXES) or ".safetensors.index." in file.name


def _write_index(pipeline: PipelineFolder, folder: Path) -> None:
    """Write ``model_index.json`` without the components that the base folder does not hold.

    A download that leaves out the safety checker would otherwise give a folder that does not load.
    """
    index = {
        name: [None, None] if isinstance(value, list) and _is_absent(folder, name, value) else value
        for name, value in pipeline.index.items()
    }
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    save_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def _is_absent(folder: Path, name: str, value: list[object]) -> bool:
    return len(value) == 2 and value[0] is not None and not (folder / name).is_dir()
