"""Write a model with adapters merged in: a diffusers folder, or one original-layout file.

Everything is streamed one tensor at a time, written beside the output, reopened and checked, and
only then renamed: an interrupted export leaves nothing behind and destroys nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.formats.adapter_file import read_adapter
from dora_diffusion.formats.adapter_metadata import OWN, without_path
from dora_diffusion.formats.checkpoint_keys import (
    Entry,
    ModelFacts,
    build_entry,
    entry_spec,
    marker_tensors,
    plan_checkpoint,
)
from dora_diffusion.formats.pipeline_folder import (
    WEIGHT_COMPONENTS,
    WEIGHT_SUFFIXES,
    PipelineFolder,
    canonical_tensor,
)
from dora_diffusion.formats.safetensors_stream import (
    DiskFullError,
    TensorFileError,
    TensorReader,
    TensorSpec,
    disk_full,
    save_text,
    write_tensors,
)
from dora_diffusion.merge import Strengths, WeightedAdapter, check_fit, layers_of, merge_tensor

# Called with the number of tensors written so far, and of all.
OnProgress = Callable[[int, int], None]
Adapters = str | Path | Sequence[tuple[str | Path, float]]

_CHECKED_TENSORS = 8
_SPARE_BYTES = 32 * 2**20


class ExportError(ValueError):
    """An export that was refused or failed its own check, with the reason."""


def export_checkpoint(
    base: str | Path,
    adapters: Adapters,
    output: str | Path,
    *,
    strength: float = 1.0,
    direction_strength: float = 1.0,
    magnitude_strength: float = 1.0,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Merge adapters into a base model and write the result.

    Args:
        base: A diffusers folder, a hub id, or ``embedded:NAME``.
        adapters: An adapter file or output folder, or several as ``[(adapter, strength), ...]``,
            whose strengths are multiplied with ``strength``. Their order does not matter.
        output: A name ending in ``.safetensors`` gives one file in the original layout, which
            every user interface reads; any other name gives a diffusers folder.
        strength: 0 is the base, 1 the adapter as trained.
        direction_strength: Scales the low-rank difference inside the norm.
        magnitude_strength: Moves the magnitude by a share of its change.
        dtype: Of the UNet and the text encoders; None keeps that of the base. The VAE keeps its
            own: SDXL's overflows in half precision.
        variant: Weight variant of the base, such as ``"fp16"``.
        overwrite: Replace an output that exists.
        on_progress: Called with (tensors written, tensors in all).

    Returns:
        The output path.

    Raises:
        ExportError: If the output exists, or the written file fails its check.
        MergeError, AdapterFormatError: If an adapter does not fit the base.
        DiskFullError: If there is not enough space; nothing is changed then.
    """
    output = Path(output)
    # Imported here: the models package is above the formats, and may import heavy libraries.
    from dora_diffusion.models.family import detect_folder_family
    from dora_diffusion.models.locate import resolve_folder

    folder = resolve_folder(base, variant=variant)
    _check_output(output, folder, overwrite)
    strengths = Strengths(strength, direction_strength, magnitude_strength)
    with PipelineFolder.open(folder, variant) as pipeline:
        weighted = read_weighted(adapters, strengths, pipeline.module_shapes())
        merged = MergedPipeline(pipeline, weighted, dtype)
        note = {"format": "pt", OWN + "merged": _provenance(adapters, strength)}
        if output.suffix == ".safetensors":
            family = detect_folder_family(folder).name
            write_single_file(merged, family, output, note, on_progress)
        else:
            write_folder(merged, output, note, on_progress)
    return output


def read_weighted(
    adapters: Adapters, strengths: Strengths, shapes: dict[str, tuple[int, ...]]
) -> list[WeightedAdapter]:
    """Read adapters, check that they fit the base's weights, and attach their strengths.

    Raises:
        MergeError: If a layer has no base weight.
        AdapterFormatError: If a file cannot be read.
    """
    weighted = []
    for path, own in _pairs(adapters):
        layers = read_adapter(path, shapes).layers
        total = Strengths(
            own * strengths.strength, strengths.direction_strength, strengths.magnitude_strength
        )
        weighted.append(WeightedAdapter(layers, total))
    if not weighted:
        raise ExportError("no adapter was given")
    check_fit(shapes, weighted)
    return weighted


def _pairs(adapters: Adapters) -> list[tuple[str | Path, float]]:
    return [(adapters, 1.0)] if isinstance(adapters, (str, Path)) else list(adapters)


def _provenance(adapters: Adapters, strength: float) -> str:
    named = [(without_path(str(Path(path).resolve())), own) for path, own in _pairs(adapters)]
    return json.dumps([{"adapter": name, "strength": own * strength} for name, own in named])


@dataclass(frozen=True)
class MergedPipeline:
    """The tensors of a pipeline with adapters merged in, computed when asked for."""

    pipeline: PipelineFolder
    adapters: Sequence[WeightedAdapter]
    dtype: torch.dtype | None = None

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape that the tensor is written with."""
        spec = self.pipeline.specs[name]
        keeps = self.dtype is None or name.startswith("vae.") or not spec.dtype.is_floating_point
        return spec if keeps or self.dtype is None else TensorSpec(self.dtype, spec.shape)

    def tensor(self, name: str) -> Tensor:
        """The merged tensor."""
        layers = layers_of(name, self.adapters)
        return merge_tensor(self.pipeline[name], layers, self.spec(name).dtype)

    def is_adapted(self, name: str) -> bool:
        """Whether an adapter acts on the tensor."""
        return bool(layers_of(name, self.adapters))


def write_single_file(
    merged: MergedPipeline,
    family: str,
    output: Path,
    metadata: dict[str, str],
    on_progress: OnProgress | None = None,
) -> None:
    """Write one file in the original layout, atomically, and check it."""
    pipeline = merged.pipeline
    configs = {c: pipeline.config(c) for c in (*WEIGHT_COMPONENTS, "scheduler")}
    facts = ModelFacts.from_configs(family, {c: config for c, config in configs.items() if config})
    entries = {entry.key: entry for entry in plan_checkpoint(facts, pipeline.specs)}
    sources = {name: merged.spec(name) for name in pipeline.specs}
    specs = {key: entry_spec(entry, sources) for key, entry in entries.items()}
    markers = marker_tensors(facts)
    specs |= {key: TensorSpec.of(tensor) for key, tensor in markers.items()}
    check_space(output, sum(spec.nbytes for spec in specs.values()))
    report = _Reporter(len(specs), on_progress)

    def load(key: str) -> Tensor:
        report.step()
        return markers[key] if key in markers else _build(entries[key], merged)

    with temporary_sibling(output) as temporary:
        write_tensors(temporary, specs, load, metadata)
        adapted = [e for e in entries.values() if any(map(merged.is_adapted, e.sources))]
        _check_sample(temporary, {e.key: e for e in _sample(adapted)}, merged)
        os.replace(temporary, output)


def _build(entry: Entry, merged: MergedPipeline) -> Tensor:
    return build_entry(entry, (merged.tensor(name) for name in entry.sources))


def _check_sample(path: Path, entries: dict[str, Entry], merged: MergedPipeline) -> None:
    """Recompute some adapted tensors and compare them with the reopened file, bit for bit."""
    with TensorReader(path) as reader:
        for key, entry in entries.items():
            if not torch.equal(reader[key], _build(entry, merged)):
                raise ExportError(f"{path.name}: {key} did not read back as it was merged")


def _sample(entries: list[Entry]) -> list[Entry]:
    step = max(1, len(entries) // _CHECKED_TENSORS)
    return entries[::step][:_CHECKED_TENSORS]


def write_folder(
    merged: MergedPipeline,
    output: Path,
    metadata: dict[str, str],
    on_progress: OnProgress | None = None,
) -> None:
    """Write a diffusers folder, atomically, and check it.

    Weights are written under their plain names, whatever variant they were read from; weights in
    other formats, and single files beside the components, hold the unmerged model and are left out.
    """
    pipeline = merged.pipeline
    written = [merged.spec(name).nbytes for name in pipeline.specs]
    check_space(output, sum(written) + sum(f.stat().st_size for f in other_files(pipeline)))
    report = _Reporter(len(written), on_progress)
    with temporary_sibling(output) as temporary:
        for file in other_files(pipeline):
            target = temporary / file.relative_to(pipeline.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        for component in pipeline.readers:
            _write_component(merged, component, temporary / component, metadata, report)
        _write_index(pipeline, temporary)
        _replace_folder(temporary, output)


def _write_component(
    merged: MergedPipeline,
    component: str,
    folder: Path,
    metadata: dict[str, str],
    report: _Reporter,
) -> None:
    reader = merged.pipeline.readers[component]
    names = {key: canonical_tensor(component, key) for key in reader.specs}

    def load(key: str) -> Tensor:
        report.step()
        return merged.tensor(names[key])

    places: dict[str, str] = {}
    for number, file in enumerate(reader.files, start=1):
        keys = [key for key in reader.specs if reader.file_of[key] == file]
        target = folder / _plain_name(component, number, len(reader.files))
        write_tensors(target, {key: merged.spec(names[key]) for key in keys}, load, metadata)
        adapted = [Entry(key, (names[key],)) for key in keys if merged.is_adapted(names[key])]
        _check_sample(target, {e.key: e for e in _sample(adapted)}, merged)
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
    top = [f for f in pipeline.path.iterdir() if f.is_file() and not _is_weight(f)]
    files = [f for f in top if not f.name.startswith(".")]
    for name, value in pipeline.index.items():
        if isinstance(value, list) and (pipeline.path / name).is_dir():
            inside = [f for f in (pipeline.path / name).rglob("*") if f.is_file()]
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


class _Reporter:
    """Counts written tensors and passes the count on."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def step(self) -> None:
        """Count one tensor."""
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def check_space(output: Path, needed: int) -> None:
    """Refuse an export that will not fit.

    Raises:
        DiskFullError: With the numbers, before anything is written.
    """
    folder = next(parent for parent in output.resolve().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        error = disk_full(output)
        text = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free"
        raise DiskFullError(error.errno, f"{error.strerror} ({text})")


def _check_output(output: Path, base: Path, overwrite: bool) -> None:
    source, target = base.resolve(), output.resolve()
    if source in target.parents or target in source.parents:
        raise ExportError(
            f"{output} and the base {base} lie inside one another; choose another name"
        )
    if not output.exists():
        return
    if not overwrite:
        raise ExportError(f"{output} exists; choose another name, or ask to overwrite it")
    if output.is_dir() and any(output.iterdir()) and not (output / "model_index.json").is_file():
        raise ExportError(f"{output} is a folder but not a model; it will not be replaced")
    if output.is_dir() and output.suffix == ".safetensors":
        raise ExportError(f"{output} is a folder; a single file cannot replace it")


@contextlib.contextmanager
def temporary_sibling(output: Path) -> Iterator[Path]:
    """A name beside ``output`` for a file or folder; what is left there in the end is removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{secrets.token_hex(6)}.tmp"
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _replace_folder(temporary: Path, output: Path) -> None:
    if not output.exists():
        os.rename(temporary, output)
        return
    with temporary_sibling(output) as old:
        os.rename(output, old)
        try:
            os.rename(temporary, output)
        except OSError:
            os.rename(old, output)
            raise


__all__ = ["ExportError", "TensorFileError", "export_checkpoint"]
