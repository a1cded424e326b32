"""A single-file checkpoint in the original layout, seen through canonical tensor names.

What open_clip joins (q, k, v) or transposes is split and turned back on loading, and the VAE's 1x1
convolutions become Linear weights.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.config.families import (
    FAMILIES,
    TITLES,
    Family,
    UnsupportedModelError,
    choose_by_channels,
)
from dora_diffusion.formats.adapter.metadata import OWN
from dora_diffusion.formats.checkpoint.entries import POSITIONS, Entry, entries_of_file
from dora_diffusion.formats.checkpoint.schedule import (
    MARKERS,
    STEP,
    Statement,
    markers_for,
    stated_by_file,
)
from dora_diffusion.formats.checkpoint.weights import SingleFile, schedule_tensors
from dora_diffusion.formats.files.stream import TensorReader, TensorSpec
from dora_diffusion.formats.names.checkpoint import UNET_PREFIX, standard_key
from dora_diffusion.formats.names.unet import TOP_MODULES

# Averaged copies of the unmerged weights; some loaders prefer them to the merged ones.
LEFT_OUT = ("model_ema.",)
# Playground 2.5 and CosXL.
_OTHER_SCHEDULES = {"edm_mean", "edm_vpred.sigma_max"}


class CheckpointFile:
    """Lazy access to a single-file checkpoint, a `StoredModel`. Use ``CheckpointFile.open``.

    Attributes:
        reader: The file.
        family: What kind of model it is.
        entries: For each tensor of the UNet, the text encoders and the VAE, the canonical tensors
            inside it.
        specs: Dtype and shape of the canonical tensors.
        restated: Settings of its noise schedule that somebody knows better than it says.

    Raises:
        UnsupportedModelError: If it is a checkpoint of no supported family.
    """

    is_single_file = True
    restated: Mapping[str, Any] = {}

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

    def statements(self) -> list[Statement]:
        return stated_by_file(self.metadata, self.reader.specs)

    def schedule(self) -> dict[str, Any]:
        said = [*reversed(self.statements()), Statement("", self.restated)]
        return {name: value for each in said for name, value in each.settings.items()}

    def markers(self) -> set[str]:
        """Return its marker tensors of the noise schedule."""
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

        Tensors that say what the model predicts are those of `schedule_tensors`.

        The numbers of a text encoder's positions are written as integers.
        """
        entries = [replace(entry, key=standard_key(entry.key)) for entry in self.entries]
        stated = schedule_tensors(self)
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
        conv_in = specs.get(f"{UNET_PREFIX}{dict(TOP_MODULES)['conv_in']}.weight")
        return choose_by_channels(fitting, conv_in.shape[1] if conv_in else 0)
    raise UnsupportedModelError(
        f"{name} is not a full checkpoint of {TITLES}: its text encoder was not found among its "
        f"{len(specs)} tensors; an adapter or a bare UNet cannot serve as the base model"
    )
