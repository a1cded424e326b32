"""A diffusers pipeline folder as files: its configs, and its tensors by canonical name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_diffusion.config.families import WEIGHT_COMPONENTS, detect_folder_family
from dora_diffusion.formats.checkpoint.entries import names_of_configs, plan_checkpoint
from dora_diffusion.formats.checkpoint.schedule import (
    CONFIGURED,
    EPSILON,
    PREDICTION,
    ZERO_SNR,
    Statement,
    markers_for,
)
from dora_diffusion.formats.checkpoint.weights import SingleFile, schedule_tensors
from dora_diffusion.formats.files.stream import TensorFileError, TensorReader, TensorSpec
from dora_diffusion.formats.names.modules import canonical

_STEMS = ("diffusion_pytorch_model", "model")
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".ckpt",
    ".pt",
    ".msgpack",
    ".h5",
    ".onnx",
    ".pb",
)


class PipelineFolder:
    """Lazy access to the weights of a Diffusers folder, a `StoredModel`. Use as a context manager.

    Attributes:
        path: The folder.
        family: What kind of model it is.
        index: Its ``model_index.json``.
        readers: A reader per component that has weights.
        specs: Canonical tensor name -> dtype and shape.
        restated: Settings of its noise schedule that somebody knows better than its configuration.

    Raises:
        TensorFileError: If it is not a pipeline folder, or lacks readable weights.
        UnsupportedModelError: If it is another kind of model.
    """

    is_single_file = False
    other_specs: Mapping[str, TensorSpec] = {}
    restated: Mapping[str, Any] = {}

    def __init__(self, path: Path, variant: str | None = None) -> None:
        self.path, self.index = path, read_index(path)
        self.family = detect_folder_family(path)
        self.readers: dict[str, TensorReader] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._raw: dict[str, tuple[str, str]] = {}
        for component in WEIGHT_COMPONENTS:
            if (path / component).is_dir():
                self._add(component, TensorReader(find_weights(path / component, variant)))

    def _add(self, component: str, reader: TensorReader) -> None:
        self.readers[component] = reader
        for key, spec in reader.specs.items():
            name = canonical(component, key)
            if name in self._raw:
                raise TensorFileError(f"{component} holds {self._raw[name][1]} and {key}")
            self._raw[name] = (component, key)
            self.specs[name] = spec

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, variant: str | None = None) -> Iterator[PipelineFolder]:
        """Open a folder and close all its files afterwards."""
        folder = cls(path, variant)
        with contextlib.ExitStack() as stack:
            for reader in folder.readers.values():
                stack.enter_context(reader)
            yield folder

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor by canonical name."""
        component, key = self._raw[name]
        return self.readers[component][key]

    @property
    def files(self) -> dict[str, list[Path]]:
        """The weight files of each component."""
        return {name: reader.files for name, reader in self.readers.items()}

    def shards(self) -> dict[str, list[dict[str, str]]]:
        """The weight files of each component, each as today's names in it -> canonical names."""
        return {
            component: [
                {
                    name.removeprefix(f"{component}."): name
                    for key, holder in reader.file_of.items()
                    if holder == file and (name := canonical(component, key))
                }
                for file in reader.files
            ]
            for component, reader in self.readers.items()
        }

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the first component."""
        return next(iter(self.readers.values())).metadata

    def config(self, component: str) -> dict[str, Any]:
        """A component's config, empty if it has none."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        path = self.path / component / name
        return read_json(path) if path.is_file() else {}

    def statements(self) -> list[Statement]:
        return [by_scheduler(self.config("scheduler"))]

    def schedule(self) -> dict[str, Any]:
        return {**self.statements()[0].settings, **self.restated}

    def markers(self) -> set[str]:
        """Return the markers of its single file."""
        return markers_for(self.family, self.schedule())

    def naming_problems(self) -> list[str]:
        """None: a folder with other names is not opened."""
        return []

    def single_file(self) -> SingleFile:
        """All tensors in the original layout, and those that say what the model predicts."""
        configs = {name: self.config(name) for name in (*WEIGHT_COMPONENTS, "scheduler")}
        names = names_of_configs(self.family, {n: c for n, c in configs.items() if c})
        entries, others = plan_checkpoint(self.family, names, self.specs), schedule_tensors(self)
        specs = {key: TensorSpec.of(tensor) for key, tensor in others.items()}
        return SingleFile(entries, specs, others.__getitem__)


def by_scheduler(config: Mapping[str, Any]) -> Statement:
    """Return the schedule of a scheduler's configuration, with Diffusers' defaults."""
    return Statement(CONFIGURED, {PREDICTION: EPSILON, ZERO_SNR: False, **config})


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
    for name in (f"{stem}.{variant}" if variant else stem for stem in _STEMS):
        # Shards of a variant are called `model.safetensors.index.fp16.json`.
        stem, _, wanted = name.partition(".")
        index = (
            f"{stem}.safetensors.index.{wanted}.json"
            if wanted
            else f"{stem}.safetensors.index.json"
        )
        for candidate in (f"{name}.safetensors", index):
            if (folder / candidate).is_file():
                return folder / candidate
    files = sorted(folder.glob("*.safetensors.index*.json")) or sorted(folder.glob("*.safetensors"))
    if variant:
        has = f"it has {', '.join(f.name for f in files)}" if files else "it has none at all"
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
    problem = f"several: {', '.join(f.name for f in files)}" if files else "none"
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
