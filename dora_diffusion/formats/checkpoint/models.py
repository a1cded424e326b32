"""Whole models on disk with canonical tensor names: Diffusers folders and single files.

Tensors of a single file are converted on loading: open_clip's joined matrices (q, k, v) are split,
its transposed ones transposed back, and the VAE's 1x1 convolutions become Linear weights.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import (
    FAMILIES,
    FLOW,
    TITLES,
    WEIGHT_COMPONENTS,
    Family,
    UnsupportedModelError,
    choose_by_channels,
    choose_by_states,
    detect_folder_family,
)
from dora_diffusion.config.pipeline_index import index_file
from dora_diffusion.formats.adapter.metadata import OWN
from dora_diffusion.formats.checkpoint.schedule import (
    CONFIGURED,
    EPSILON,
    EPSILON_STEP,
    MARKERS,
    PREDICTION,
    STEP,
    ZERO_SNR,
    ScheduleInfo,
    choose_schedule,
    markers_for,
    stated_by_file,
    statements_on,
    usual_of,
)
from dora_diffusion.formats.checkpoint.weights import (
    POSITIONS,
    UNET_PREFIX,
    CheckpointLayoutError,
    Entry,
    SingleFile,
    entries_of_file,
    module_shapes,
    names_of_configs,
    plan_checkpoint,
    standard_key,
    without_prefix,
)
from dora_diffusion.formats.files.runs import pipeline_in
from dora_diffusion.formats.files.stream import (
    TensorFileError,
    TensorReader,
    TensorSpec,
    read_header,
)
from dora_diffusion.formats.names.modules import TOP_MODULES, canonical, transformer_names

if TYPE_CHECKING:
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata

WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".ckpt", ".pt",
    ".msgpack", ".h5", ".onnx", ".pb",
)  # fmt: skip
# Averaged copies (EMA) of the unmerged weights, which some loaders prefer to the merged ones.
LEFT_OUT = ("model_ema.",)
_DENOISER_KEYS = {family.denoiser_key for family in FAMILIES.values()} - {""}
# Playground 2.5 and CosXL.
_OTHER_SCHEDULES = {"edm_mean", "edm_vpred.sigma_max"}


class StoredModel(ABC):
    """Weights of a whole model on disk: a Diffusers folder or a single file.

    Attributes:
        path: The folder or file.
        is_single_file: Whether it is one file in the original layout.
        family: Family of the model.
        files: Weight files by component; the key for a single file is ``"checkpoint"``.
        metadata: Metadata of the (first) weight file.
        specs: Dtype and shape of every tensor, by canonical name.
        other_specs: Tensors of a single file without a component, by their names in the file.
        restated: Settings of the noise schedule that override the model's.
    """

    path: Path
    is_single_file: bool
    family: Family
    files: Mapping[str, Sequence[Path]]
    metadata: Mapping[str, str]
    specs: dict[str, TensorSpec]
    other_specs: Mapping[str, TensorSpec]
    restated: Mapping[str, Any] = {}

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """Load a tensor by canonical name."""

    @abstractmethod
    def statements(self) -> list[ScheduleInfo]:
        """Return the model's own statements on its noise schedule, the strongest first."""

    @abstractmethod
    def markers(self) -> set[str]:
        """Return the marker tensors of the model's single file, or of one written from it."""

    @abstractmethod
    def single_file(self, *, complete: bool = True) -> SingleFile:
        """Return the source from which one file in the original layout is written.

        Args:
            complete: False: the denoiser alone.

        Raises:
            CheckpointLayoutError: If the model does not fit that layout.
        """

    @property
    def left_out(self) -> set[str]:
        """Components that are in other files, if the family has separate files."""
        family = self.family
        if not family.has_separate_files:
            return set()
        components = {name.partition(".")[0] for name in self.specs}
        return {family.denoiser, "vae", *family.text_encoder_names} - components

    def shards(self) -> dict[str, list[dict[str, str]]]:
        """Return the weight files of each component, each as current names -> canonical names.

        A single file has none.
        """
        return {}

    def naming_problems(self) -> list[str]:
        """Return problems with names of tensors, one line each.

        A folder has none: it is not opened if names differ.
        """
        return []

    def schedule(self) -> dict[str, Any]:
        """Return the stated settings of the noise schedule."""
        stated = [*(statement.settings for statement in reversed(self.statements())), self.restated]
        return {name: value for settings in stated for name, value in settings.items()}

    def override_schedule(self, base: BaseModel, adapters: Sequence[AdapterMetadata]) -> None:
        """Override the noise schedule by the user's settings or the adapters' metadata.

        Args:
            base: The model with the user's settings.
            adapters: Metadata of the adapters to merge.

        Raises:
            ValueError: If zero terminal SNR is requested for a model that predicts the noise.
        """
        statements = statements_on(base, self.statements(), usual_of(self.family), adapters)
        schedule = choose_schedule(self.path.name, statements)
        if not schedule.is_own:
            self.restated = schedule.settings

    def _schedule_tensors(self) -> dict[str, Tensor]:
        """Return the tensors without a component by which a single file states its schedule."""
        tensors = {name: torch.empty(0) for name in self.markers()}
        if self.family.has_two_predictions and self.schedule().get(PREDICTION) == EPSILON:
            tensors[STEP] = torch.tensor(EPSILON_STEP)
        return tensors


class Component:
    """Lazy access to the weights of one component's folder by canonical name.

    Close the ``reader`` to close the files.

    Args:
        name: Name of the component.
        folder: Folder of the component.
        variant: As in `find_weights`.

    Raises:
        TensorFileError: If there are no readable weights, or a weight exists twice.
    """

    def __init__(self, name: str, folder: Path, variant: str | None) -> None:
        self.reader, self.key_of = TensorReader(find_weights(folder, variant)), dict[str, str]()
        for key in self.reader.specs:
            if (other := self.key_of.setdefault(canonical(name, key), key)) != key:
                raise TensorFileError(f"{name} has one tensor twice, as {other} and {key}")
        self.specs = {n: self.reader.specs[key] for n, key in self.key_of.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.reader[self.key_of[name]]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Load rows of a weight, ``(stop - start, n)``."""
        return self.reader.rows(self.key_of[name], start, stop).flatten(1)


class PipelineFolder(StoredModel):
    """Lazy access to the weights of a Diffusers folder. Use ``PipelineFolder.open``.

    Attributes:
        index: Content of its index.
        components: The components with weights.

    Raises:
        TensorFileError: If it is not a pipeline folder, or lacks readable weights.
        UnsupportedModelError: If it is another kind of model.
    """

    is_single_file = False
    other_specs: Mapping[str, TensorSpec] = {}

    def __init__(self, path: Path, variant: str | None = None) -> None:
        self.path, self.index = path, read_index(path)
        self.family = detect_folder_family(path)
        self.components = {
            name: Component(name, path / name, variant)
            for name in WEIGHT_COMPONENTS
            if (path / name).is_dir()
        }
        self.specs = {
            n: spec for part in self.components.values() for n, spec in part.specs.items()
        }
        self.files = {name: part.reader.files for name, part in self.components.items()}
        self.metadata = next((part.reader.metadata for part in self.components.values()), {})

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, variant: str | None = None) -> Iterator[PipelineFolder]:
        """Open a folder and close all its files afterwards."""
        folder = cls(path, variant)
        with contextlib.ExitStack() as stack:
            for component in folder.components.values():
                stack.enter_context(component.reader)
            yield folder

    def __getitem__(self, name: str) -> Tensor:
        return self.components[name.partition(".")[0]][name]

    def shards(self) -> dict[str, list[dict[str, str]]]:
        shards: dict[str, list[dict[str, str]]] = {}
        for name, component in self.components.items():
            by_file: dict[Path, dict[str, str]] = {file: {} for file in component.reader.files}
            for tensor, key in component.key_of.items():
                by_file[component.reader.file_of[key]][tensor.removeprefix(f"{name}.")] = tensor
            shards[name] = list(by_file.values())
        return shards

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's config; empty if it has none."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        path = self.path / component / name
        return read_json(path) if path.is_file() else {}

    def statements(self) -> list[ScheduleInfo]:
        return [by_scheduler(self.config("scheduler"))]

    def markers(self) -> set[str]:
        return markers_for(self.family, self.schedule())

    def single_file(self, *, complete: bool = True) -> SingleFile:
        """Return the tensors in the original layout, and the markers of the prediction type."""
        configs = {name: self.config(name) for name in (*WEIGHT_COMPONENTS, "scheduler")}
        family, alone = self.family, self.family.denoiser_components
        prefix = UNET_PREFIX if complete else family.denoiser_prefix
        names = names_of_configs(family, {n: c for n, c in configs.items() if c}, prefix)
        planned = [n for n in self.specs if complete or n.partition(".")[0] in alone]
        entries, stated = plan_checkpoint(family, names, planned), self._schedule_tensors()
        specs = {key: TensorSpec.of(tensor) for key, tensor in stated.items()}
        return SingleFile(entries, specs, stated.__getitem__)


def by_scheduler(config: Mapping[str, Any]) -> ScheduleInfo:
    """Return the schedule of a scheduler's configuration, with Diffusers' defaults."""
    if str(config.get("_class_name", "")).startswith("FlowMatch"):
        return ScheduleInfo(CONFIGURED, {PREDICTION: FLOW})
    return ScheduleInfo(CONFIGURED, {PREDICTION: EPSILON, ZERO_SNR: False, **config})


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """Return the safetensors file (or index of shards) of a component folder.

    Args:
        folder: The component's folder.
        variant: ``"fp16"`` selects ``*.fp16.safetensors``. None prefers the plain file, or else
            selects the only variant.

    Raises:
        TensorFileError: If there is no such file, or the choice is ambiguous.
    """
    end = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        for name in (f"{stem}{end}.safetensors", f"{stem}.safetensors.index{end}.json"):
            if (folder / name).is_file():
                return folder / name
    files = sorted(folder.glob("*.safetensors.index*.json")) or sorted(folder.glob("*.safetensors"))
    names = ", ".join(file.name for file in files)
    if variant:
        has = f"it has {names}" if files else "it has none at all"
        raise TensorFileError(
            f"{folder} has no weights of the variant {variant!r}; {has}: name another variant, "
            "or none for the plain weights"
        )
    if len(files) == 1:
        return files[0]
    if not files and (pickles := [*folder.glob("*.bin"), *folder.glob("*.ckpt")]):
        raise TensorFileError(
            f"{folder} stores its weights as a pickle ({pickles[0].name}), which can run code when "
            "opened; use a model with .safetensors weights, or convert it first"
        )
    problem = f"several: {names}" if files else "none"
    raise TensorFileError(f"{folder} must contain one safetensors weight file; found {problem}")


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a pipeline folder.

    Raises:
        TensorFileError: If it is missing or damaged, or the name of a component is not a Python
            identifier: it could be a path outside of the folder.
    """
    file = index_file(folder)
    index = read_json(file)
    for name, value in index.items():
        if isinstance(value, list) and not name.isidentifier():
            raise TensorFileError(
                f"{file} names a component {name!r}, which is not the name of a folder in it; do "
                "not use this model, or remove that line"
            )
    return index


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model's folder.

    Raises:
        TensorFileError: If the file is missing or contains something else.
    """
    try:
        loaded = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TensorFileError(f"{path} is missing or damaged; download the model again") from error
    if not isinstance(loaded, dict):
        raise TensorFileError(f"{path} is not a JSON object; download the model again")
    return loaded


class CheckpointFile(StoredModel):
    """Lazy access to a single-file checkpoint. Use ``CheckpointFile.open``.

    Attributes:
        reader: Reader of the file.
        entries: Tensors of the UNet, the text encoders and the VAE, with their canonical sources.

    Raises:
        UnsupportedModelError: If its family is not supported.
    """

    is_single_file = True

    def __init__(self, reader: TensorReader) -> None:
        self.reader, self.path, self.metadata = reader, reader.path, reader.metadata
        self.files = {"checkpoint": reader.files}
        self.family = detect_checkpoint_family(reader.specs, reader.path.name)
        self.entries = entries_of_file(self.family, reader.specs)
        self.specs = {}
        self._entry_of: dict[str, Entry] = {}
        for entry in self.entries:
            self._entry_of |= dict.fromkeys(entry.sources, entry)
            self.specs |= dict.fromkeys(entry.sources, entry.source_spec(reader.specs[entry.key]))
        planned = {entry.key for entry in self.entries}
        self.other_specs = {
            key: spec
            for key, spec in reader.specs.items()
            if key not in planned and not key.startswith(LEFT_OUT)
        }

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[CheckpointFile]:
        """Open a checkpoint and close it afterwards."""
        with TensorReader(path) as reader:
            yield cls(reader)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entry_of[name]
        return entry.source(name, self.reader[entry.key])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Load rows of a weight, ``(stop - start, n)``."""
        entry = self._entry_of[name]
        if entry.operation in ("transpose", "swap"):
            return self[name][start:stop]
        before = entry.sources.index(name) * self.specs[name].shape[0]
        return self.reader.rows(entry.key, before + start, before + stop).flatten(1)

    def statements(self) -> list[ScheduleInfo]:
        return stated_by_file(self.metadata, self.reader.specs)

    def markers(self) -> set[str]:
        if self.restated:
            return markers_for(self.family, self.restated)
        return set(MARKERS.keys() & self.reader.specs.keys())

    def naming_problems(self) -> list[str]:
        """Return lines on misnamed tensors and on averaged copies."""
        problems = [
            f"{key} should be called {standard_key(key)}: most programs do not find it"
            for key in self.reader.specs
            if standard_key(key) != key
        ]
        averaged = "it contains averaged copies (model_ema), which some programs load instead"
        return problems + [averaged] * any(key.startswith(LEFT_OUT) for key in self.reader.specs)

    def single_file(self, *, complete: bool = True) -> SingleFile:
        """Return the same layout with standard names; tensors without a component are copied.

        Markers of the prediction type are corrected, and a text encoder's position ids become
        integers.
        """
        if not complete:
            return self._denoiser_alone()
        if self.left_out:
            raise CheckpointLayoutError(
                f"{self.path.name} does not have the {' and '.join(sorted(self.left_out))}; leave "
                "out --complete, or export a folder"
            )
        entries = [replace(entry, key=standard_key(entry.key)) for entry in self.entries]
        stated = self._schedule_tensors()
        replaced = {*MARKERS, STEP} if self.family.has_two_predictions else {*MARKERS}
        key_of = {standard_key(key): key for key in self.other_specs if key not in replaced}
        specs = {
            key: TensorSpec(torch.int64, self.other_specs[old].shape)
            if key.endswith(POSITIONS)
            else self.other_specs[old]
            for key, old in key_of.items()
        }
        specs |= {key: TensorSpec.of(tensor) for key, tensor in stated.items()}

        def load(key: str) -> Tensor:
            return stated[key] if key in stated else self.reader[key_of[key]].to(specs[key].dtype)

        return SingleFile(entries, specs, load)

    def _denoiser_alone(self) -> SingleFile:
        alone, prefix = self.family.denoiser_components, self.family.denoiser_prefix
        entries = [
            replace(entry, key=prefix + without_prefix(entry.key))
            for entry in self.entries
            if entry.sources[0].partition(".")[0] in alone
        ]
        return SingleFile(entries, {}, self.reader.__getitem__)


def is_model(path: str | Path) -> bool:
    """Return whether a path is a whole model: a Diffusers folder or a single file."""
    path = Path(path).expanduser()
    if path.is_dir():
        return pipeline_in(path) is not None
    try:
        keys = read_header(path).specs
        return any(
            key.startswith(UNET_PREFIX) or without_prefix(key) in _DENOISER_KEYS for key in keys
        )
    except (TensorFileError, OSError):
        return False


def comparable_shapes(*models: StoredModel) -> list[dict[str, tuple[int, ...]]]:
    """Return `module_shapes` of models, without components that one of them leaves out."""
    left_out = set[str]().union(*(model.left_out for model in models))
    return [
        {n: shape for n, shape in module_shapes(m).items() if n.partition(".")[0] not in left_out}
        for m in models
    ]


def base_name(metadata: Mapping[str, str]) -> str:
    """Return the base of a model that this program wrote, from its metadata; empty if unknown."""
    try:
        return str(json.loads(metadata[OWN + "base"])["name"])
    except (ValueError, TypeError, KeyError):
        return ""


def detect_checkpoint_family(
    specs: Mapping[str, TensorSpec], name: str = "the checkpoint"
) -> Family:
    """Detect the family of a single-file checkpoint from names of tensors and the UNet's input.

    Raises:
        UnsupportedModelError: If no name identifies a supported family.
    """
    names = {without_prefix(standard_key(key)) for key in specs}
    if other := names & _OTHER_SCHEDULES:
        raise UnsupportedModelError(
            f"{name} contains {min(other)}: it has another kind of noise schedule (EDM) than "
            f"{TITLES}; such models are not supported"
        )
    fitting = [family for family in FAMILIES.values() if family.checkpoint_key in names]
    if len(fitting) > 1 and not fitting[0].has_unet:
        states = transformer_names(fitting[0].code).to_original("context_embedder.weight")
        spec = specs.get(f"{UNET_PREFIX}{states}") or specs.get(f"{states}")
        width, length = spec.shape if spec and len(spec.shape) == 2 else (1, 0)
        return choose_by_states(fitting, length, width)
    if fitting:
        conv_in = specs.get(f"{UNET_PREFIX}{TOP_MODULES['conv_in']}.weight")
        return choose_by_channels(fitting, conv_in.shape[1] if conv_in else 0)
    raise UnsupportedModelError(
        f"{name} is not a full checkpoint of {TITLES}: its text encoder was not found among its "
        f"{len(specs)} tensors; an adapter or a bare UNet cannot serve as the base model"
    )
