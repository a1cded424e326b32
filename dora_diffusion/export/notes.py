"""The metadata of models that are written: what they are, and what they were made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from dora_diffusion.export.base import model_name
from dora_diffusion.export.card import merged_card
from dora_diffusion.export.merge_spec import MergeSpec, file_hash
from dora_diffusion.formats.adapter.file import AdapterFile
from dora_diffusion.formats.adapter.metadata import OWN, modelspec_fields
from dora_diffusion.formats.checkpoint.weights import StoredModel

MERGED, BASE, TRAINED = OWN + "merged", OWN + "base", OWN + "trained"
_UNKNOWN_HASH = "0" * 64
# What a base says of its own bytes is not true of a changed file.
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


class Notes(Protocol):
    """What the files of an output say of it."""

    def card(self, old: str) -> str:
        """The model card of a folder; ``old`` is that of the base."""

    def draft(self) -> dict[str, str]:
        """The metadata, as long as the final ones."""

    def final(self) -> dict[str, str]:
        """The metadata."""


class MergeNotes:
    """Metadata of an output, complete once the base's hashes are known.

    Hashing a model of several gigabytes takes about as long as reading it, so it runs beside the
    merge; the file is written with zeros in the hashes' places, which are filled in the end.
    """

    def __init__(
        self,
        model: StoredModel,
        spec: MergeSpec,
        adapters: Sequence[AdapterFile],
        output: Path,
    ) -> None:
        kept = {name: text for name, text in model.metadata.items() if name not in _HASHES}
        if not model.is_single_file:
            kept = {TRAINED: kept[TRAINED]} if TRAINED in kept else {}
        self._name = model_name(model.path)
        self._record = spec.record()
        self._title = output.resolve().name
        kept.pop(MERGED, None)
        merged = {MERGED: json.dumps(self._record)} if self._record else {}
        self._fields = {**kept, "format": "pt", **merged}
        words = [trained_trigger(model.metadata), *(a.metadata.trigger for a in adapters)]
        triggers = dict.fromkeys(word for word in words if word)
        self._triggers = list(triggers)
        if output.suffix == ".safetensors":
            # Where there are releases of both kinds, silence tells nothing.
            usual = "" if model.family.released_epsilon_id else "epsilon"
            prediction_type = model.schedule().get("prediction_type", usual)
            fields = modelspec_fields(
                model.family, output.stem, ", ".join(triggers), prediction_type
            )
            if not prediction_type:  # of two architectures; what the base says of itself stays
                del fields["modelspec.architecture"]
            self._fields |= fields
        self._pool = ThreadPoolExecutor(1)
        self._hashes: dict[str, Future[str]] = {
            name: self._pool.submit(file_hash, files) for name, files in model.files.items()
        }

    def card(self, old: str) -> str:
        """The model card of a folder; ``old`` is that of the base, which stays if it is all."""
        if not self._record and old:
            return old
        return merged_card(self._title, self._name, self._record, self._triggers, old)

    def draft(self) -> dict[str, str]:
        """The metadata with zeros for the base's hashes."""
        return self._with(dict.fromkeys(self._hashes, _UNKNOWN_HASH))

    def final(self) -> dict[str, str]:
        """The metadata; waits for the hashes."""
        return self._with({name: future.result() for name, future in self._hashes.items()})

    def close(self) -> None:
        """Give up on hashes that nobody waits for any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _with(self, hashes: Mapping[str, str]) -> dict[str, str]:
        base = {"name": self._name, "sha256": dict(hashes)}
        return {**self._fields, BASE: json.dumps(base)}


def trained_steps(metadata: Mapping[str, str]) -> int | None:
    """The optimizer steps that the metadata of a trained model's file tell of."""
    steps = json.loads(metadata.get(TRAINED, "{}")).get("training_steps", "")
    return int(steps) if steps.isdecimal() else None


def trained_trigger(metadata: Mapping[str, str]) -> str:
    """The trigger words that they tell of; empty where they tell of none."""
    return str(json.loads(metadata.get(TRAINED, "{}")).get("trigger", ""))
