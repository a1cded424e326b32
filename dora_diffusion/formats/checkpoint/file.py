"""A single-file checkpoint in the original layout, seen through canonical tensor names.

What open_clip joins (q, k, v) or transposes is split and turned back on loading, and the VAE's 1x1
convolutions become Linear weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.families import (
    FAMILIES,
    TITLES,
    Family,
    UnsupportedModelError,
    choose_by_channels,
)
from dora_diffusion.formats.checkpoint.entries import POSITIONS, Entry, entries_of_file
from dora_diffusion.formats.checkpoint.weights import SingleFile
from dora_diffusion.formats.files.header import TensorSpec
from dora_diffusion.formats.files.stream import TensorReader
from dora_diffusion.formats.names.checkpoint import UNET_PREFIX, standard_key
from dora_diffusion.formats.names.unet import TOP_MODULES

# Averaged copies of the unmerged weights; some loaders prefer them to the merged ones.
LEFT_OUT = ("model_ema.",)
# Empty tensors by which a file says how its noise schedule is meant.
MARKERS: Mapping[str, Mapping[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True},
}
# What `modelspec.prediction_type` says, and the ends of Stable Diffusion 2's architectures.
_PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon"}
_ARCHITECTURES = {"-768-v": "v_prediction", "-512": "epsilon"}


class CheckpointFile:
    """Lazy access to a single-file checkpoint, a `StoredModel`. Use ``CheckpointFile.open``.

    Attributes:
        reader: The file.
        family: What kind of model it is.
        entries: For each tensor of the UNet, the text encoders and the VAE, the canonical tensors
            inside it.
        specs: Dtype and shape of the canonical tensors.

    Raises:
        UnsupportedModelError: If it is a checkpoint of no supported family.
    """

    is_single_file = True

    def __init__(self, reader: TensorReader) -> None:
        self.reader, self.path = reader, reader.path
        self.family = detect_checkpoint_family(reader.specs, reader.path.name)
        self.entries = entries_of_file(self.family, reader.specs)
        self.specs: dict[str, TensorSpec] = {}
        self._entry_of: dict[str, Entry] = {}
        for entry in self.entries:
            self._entry_of |= dict.fromkeys(entry.sources, entry)
            self.specs |= dict.fromkeys(entry.sources, entry.source_spec(reader.specs[entry.key]))

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[CheckpointFile]:
        """Open a checkpoint and close it afterwards."""
        with TensorReader(path) as reader:
            yield cls(reader)

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor by canonical name."""
        entry = self._entry_of[name]
        return entry.source(name, self.reader[entry.key])

    @property
    def files(self) -> dict[str, list[Path]]:
        return {"checkpoint": self.reader.files}

    def shards(self) -> dict[str, list[dict[str, str]]]:
        """None: it has no component folders."""
        return {}

    @property
    def metadata(self) -> dict[str, str]:
        return self.reader.metadata

    def schedule(self) -> dict[str, Any]:
        return stated_schedule(self.metadata, self.reader.specs)

    def markers(self) -> set[str]:
        """Those of its tensors that say how its noise schedule is meant."""
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

    @cached_property
    def other_specs(self) -> dict[str, TensorSpec]:
        """The tensors of no component, such as the noise schedule, by their names in the file."""
        planned = {entry.key for entry in self.entries}
        return {
            key: spec
            for key, spec in self.reader.specs.items()
            if key not in planned and not key.startswith(LEFT_OUT)
        }

    def single_file(self) -> SingleFile:
        """The same layout under standard names; tensors of no component are copied.

        The numbers of a text encoder's positions are written as integers.
        """
        entries = [replace(entry, key=standard_key(entry.key)) for entry in self.entries]
        key_of = {standard_key(key): key for key in self.other_specs}
        specs = {
            key: TensorSpec(torch.int64, self.other_specs[old].shape)
            if key.endswith(POSITIONS)
            else self.other_specs[old]
            for key, old in key_of.items()
        }

        def load(key: str) -> Tensor:
            return self.reader[key_of[key]].to(specs[key].dtype)

        return SingleFile(entries, specs, load)


def detect_checkpoint_family(
    specs: Mapping[str, TensorSpec], name: str = "the checkpoint"
) -> Family:
    """Tell the family of a single-file checkpoint from its tensors' names and the UNet's input.

    Raises:
        UnsupportedModelError: If no family's marker is among them.
    """
    names = {standard_key(key) for key in specs}
    fitting = [family for family in FAMILIES.values() if family.checkpoint_key in names]
    if fitting:
        conv_in = specs.get(f"{UNET_PREFIX}{dict(TOP_MODULES)['conv_in']}.weight")
        return choose_by_channels(fitting, conv_in.shape[1] if conv_in else 0)
    raise UnsupportedModelError(
        f"{name} is not a full checkpoint of {TITLES}: its text encoder was not found among its "
        f"{len(specs)} tensors; an adapter or a bare UNet cannot serve as the base model"
    )


def stated_schedule(metadata: Mapping[str, str], names: Iterable[str]) -> dict[str, Any]:
    """The settings of a scheduler that a file states: by marker tensors, or metadata."""
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    stated = _PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""), "")
    for end, prediction in _ARCHITECTURES.items():
        if not stated and architecture.endswith(end):
            stated = prediction
    settings: dict[str, Any] = {"prediction_type": stated} if stated else {}
    for marker in MARKERS.keys() & set(names):
        settings |= MARKERS[marker]
    return settings
