"""Whole models on disk, seen through canonical tensor names: Diffusers folders and single files.

Of a single file in the original layout, what open_clip joins (q, k, v) or transposes is split and
turned back on loading, and the VAE's 1x1 convolutions become Linear weights.
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
    TITLES,
    WEIGHT_COMPONENTS,
    Family,
    UnsupportedModelError,
    choose_by_channels,
    detect_folder_family,
)
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
    Entry,
    SingleFile,
    entries_of_file,
    names_of_configs,
    plan_checkpoint,
    standard_key,
)
from dora_diffusion.formats.files.runs import pipeline_in
from dora_diffusion.formats.files.stream import (
    TensorFileError,
    TensorReader,
    TensorSpec,
    read_header,
)
from dora_diffusion.formats.names.modules import TOP_MODULES, canonical

if TYPE_CHECKING:
    from dora_diffusion.formats.adapter.metadata import AdapterMetadata

WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".ckpt", ".pt",
    ".msgpack", ".h5", ".onnx", ".pb",
)  # fmt: skip
# Averaged copies of the unmerged weights; some loaders prefer them to the merged ones.
LEFT_OUT = ("model_ema.",)
# Playground 2.5 and CosXL.
_OTHER_SCHEDULES = {"edm_mean", "edm_vpred.sigma_max"}


class StoredModel(ABC):
    """The weights of a whole model on disk: a Diffusers folder or a single file.

    Attributes:
        path: The folder or file.
        is_single_file: It is one file in the original layout.
        family: What kind of model it is.
        files: Weight files by component; a single file is its own ``"checkpoint"``.
        metadata: The metadata of its (first) weight file.
        specs: Dtype and shape of every tensor, by canonical name.
        other_specs: Tensors of no component that a single file holds, by their names in it.
        restated: Settings of its noise schedule that somebody knows better than it says.
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
        """Load one tensor by canonical name."""

    @abstractmethod
    def statements(self) -> list[ScheduleInfo]:
        """Return the model's own statements on its noise schedule, the strongest first."""

    @abstractmethod
    def markers(self) -> set[str]:
        """Empty tensors by which it says, or would say, that it predicts v."""

    @abstractmethod
    def single_file(self) -> SingleFile:
        """Return the source from which one file in the original layout is written.

        Raises:
            CheckpointLayoutError: If the model has no place in that layout.
        """

    def shards(self) -> dict[str, list[dict[str, str]]]:
        """The weight files of each component, each as today's names in it -> canonical names.

        A single file has none.
        """
        return {}

    def naming_problems(self) -> list[str]:
        """Names by which programs miss tensors, or load others, one line each.

        A folder with other names is not opened.
        """
        return []

    def schedule(self) -> dict[str, Any]:
        """The settings of its noise schedule, as far as it states them."""
        said = [*(each.settings for each in reversed(self.statements())), self.restated]
        return {name: value for settings in said for name, value in settings.items()}

    def override_schedule(self, base: BaseModel, adapters: Sequence[AdapterMetadata]) -> None:
        """Override its noise schedule by what was asked for, or what its adapters know.

        Args:
            base: What it was opened as.
            adapters: What is known of those that go into it.

        Raises:
            ValueError: If zero terminal SNR is asked for of a model that predicts the noise.
        """
        said = statements_on(base, self.statements(), usual_of(self.family), adapters)
        schedule = choose_schedule(self.path.name, said)
        if not schedule.is_own:
            self.restated = schedule.settings

    def _schedule_tensors(self) -> dict[str, Tensor]:
        """The tensors of no component by which a single file says how its schedule is meant."""
        tensors = {name: torch.empty(0) for name in self.markers()}
        if self.family.has_two_predictions and self.schedule().get(PREDICTION) == EPSILON:
            tensors[STEP] = torch.tensor(EPSILON_STEP)
        return tensors


class Component:
    """Lazy access to the weights of one component's folder by canonical name.

    Its ``reader`` closes its files.

    Args:
        name: The component.
        folder: Its folder.
        variant: As of `find_weights`.

    Raises:
        TensorFileError: If it lacks readable weights, or has one twice.
    """

    def __init__(self, name: str, folder: Path, variant: str | None) -> None:
        self.reader, self.key_of = TensorReader(find_weights(folder, variant)), dict[str, str]()
        for key in self.reader.specs:
            if (other := self.key_of.setdefault(canonical(name, key), key)) != key:
                raise TensorFileError(f"{name} holds {other} and {key}")
        self.specs = {each: self.reader.specs[key] for each, key in self.key_of.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.reader[self.key_of[name]]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Load rows of a weight, ``(stop - start, n)``."""
        return self.reader.rows(self.key_of[name], start, stop).flatten(1)


class PipelineFolder(StoredModel):
    """Lazy access to the weights of a Diffusers folder. Use ``PipelineFolder.open``.

    Attributes:
        index: Its ``model_index.json``.
        components: Those that have weights.

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
        return {
            name: [
                {
                    each.removeprefix(f"{name}."): each
                    for each, key in component.key_of.items()
                    if component.reader.file_of[key] == file
                }
                for file in component.reader.files
            ]
            for name, component in self.components.items()
        }

    def config(self, component: str) -> dict[str, Any]:
        """A component's config, empty if it has none."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        path = self.path / component / name
        return read_json(path) if path.is_file() else {}

    def statements(self) -> list[ScheduleInfo]:
        return [by_scheduler(self.config("scheduler"))]

    def markers(self) -> set[str]:
        return markers_for(self.family, self.schedule())

    def single_file(self) -> SingleFile:
        """All tensors in the original layout, and those that say what the model predicts."""
        configs = {name: self.config(name) for name in (*WEIGHT_COMPONENTS, "scheduler")}
        names = names_of_configs(self.family, {n: c for n, c in configs.items() if c})
        entries, others = plan_checkpoint(self.family, names, self.specs), self._schedule_tensors()
        specs = {key: TensorSpec.of(tensor) for key, tensor in others.items()}
        return SingleFile(entries, specs, others.__getitem__)


def by_scheduler(config: Mapping[str, Any]) -> ScheduleInfo:
    """Return the schedule of a scheduler's configuration, with Diffusers' defaults."""
    return ScheduleInfo(CONFIGURED, {PREDICTION: EPSILON, ZERO_SNR: False, **config})


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """The safetensors file (or index of shards) of a component folder.

    Args:
        folder: The component's folder.
        variant: ``"fp16"`` takes ``*.fp16.safetensors``; None prefers the plain file, and takes
            the only variant if there is no plain file.

    Raises:
        TensorFileError: If there is none, of the variant that is asked for above all, or the
            choice is not clear.
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
            f"{folder} holds its weights as a pickle ({pickles[0].name}), which can run code when "
            "opened; use a model with .safetensors weights, or convert it first"
        )
    problem = f"several: {names}" if files else "none"
    raise TensorFileError(f"{folder}: it should hold one safetensors weight file; found {problem}")


def read_index(folder: Path) -> dict[str, Any]:
    """The ``model_index.json`` of a pipeline folder.

    Raises:
        TensorFileError: If it is missing or damaged, or names a component that could lie outside
            of the folder: components are arguments of the pipeline, so names as in code.
    """
    index = read_json(folder / "model_index.json")
    for name, value in index.items():
        if isinstance(value, list) and not name.isidentifier():
            raise TensorFileError(
                f"{folder / 'model_index.json'} names a component {name!r}, which is not the name "
                "of a folder in it; do not use this model, or remove that line"
            )
    return index


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model's folder.

    Raises:
        TensorFileError: If the file is missing or holds something else.
    """
    try:
        loaded = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TensorFileError(f"{path} is missing or damaged; download the model again") from error
    if not isinstance(loaded, dict):
        raise TensorFileError(f"{path} holds no JSON object; download the model again")
    return loaded


class CheckpointFile(StoredModel):
    """Lazy access to a single-file checkpoint. Use ``CheckpointFile.open``.

    Attributes:
        reader: The file.
        entries: For each tensor of the UNet, the text encoders and the VAE, the canonical tensors
            inside it.

    Raises:
        UnsupportedModelError: If it is a checkpoint of no supported family.
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
        if entry.operation == "transpose":
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
        """Tensors that most programs do not find, and copies that some load instead."""
        problems = [
            f"{key} should be called {standard_key(key)}: most programs do not find it"
            for key in self.reader.specs
            if standard_key(key) != key
        ]
        if any(key.startswith(LEFT_OUT) for key in self.reader.specs):
            problems.append(
                "it holds averaged copies (model_ema), which some programs load instead"
            )
        return problems

    def single_file(self) -> SingleFile:
        """The same layout under standard names; tensors of no component are copied.

        Tensors that say what the model predicts are written as it is known to be, and the numbers
        of a text encoder's positions as integers.
        """
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


def is_model(path: str | Path) -> bool:
    """Return whether a path is that of a whole model: a Diffusers folder or a single file."""
    path = Path(path).expanduser()
    if path.is_dir():
        return pipeline_in(path) is not None
    try:
        return any(key.startswith(UNET_PREFIX) for key in read_header(path).specs)
    except (TensorFileError, OSError):
        return False


def base_name(metadata: Mapping[str, str]) -> str:
    """The model that a model of ours was made from, by its metadata; empty where it has none."""
    try:
        return str(json.loads(metadata[OWN + "base"])["name"])
    except (ValueError, TypeError, KeyError):
        return ""


def detect_checkpoint_family(
    specs: Mapping[str, TensorSpec], name: str = "the checkpoint"
) -> Family:
    """Detect the family of a single-file checkpoint from its tensors' names and the UNet's input.

    Raises:
        UnsupportedModelError: If no family's marker is among them.
    """
    names = {standard_key(key) for key in specs}
    if other := names & _OTHER_SCHEDULES:
        raise UnsupportedModelError(
            f"{name} holds {min(other)}: it has another kind of noise schedule (EDM) than "
            f"{TITLES}; such models are not supported"
        )
    fitting = [family for family in FAMILIES.values() if family.checkpoint_key in names]
    if fitting:
        conv_in = specs.get(f"{UNET_PREFIX}{TOP_MODULES['conv_in']}.weight")
        return choose_by_channels(fitting, conv_in.shape[1] if conv_in else 0)
    raise UnsupportedModelError(
        f"{name} is not a full checkpoint of {TITLES}: its text encoder was not found among its "
        f"{len(specs)} tensors; an adapter or a bare UNet cannot serve as the base model"
    )
