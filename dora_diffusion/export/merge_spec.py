"""Adapters and strengths of a merge into a model, and the record of it in the output."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from dora_diffusion.export.files import ExportError
from dora_diffusion.formats.adapter.embeddings import (
    Vectors,
    are_equal,
    embedding_files,
    read_tokens,
)
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter
from dora_diffusion.formats.adapter.metadata import without_path
from dora_diffusion.formats.adapter.stored import find_adapter
from dora_diffusion.formats.checkpoint.weights import ModelWeights
from dora_diffusion.formats.layouts.dotted import PEFT_FILE
from dora_diffusion.numerics.merging import WeightedAdapter
from dora_diffusion.numerics.weights import (
    LayerWeights,
    MergeStrengths,
    Strengths,
    require_strength,
)

Adapters = str | Path | Sequence[tuple[str | Path, float]]
_CHUNK = 2**18  # stays in the processor's cache between reading and hashing
_KNOBS = ("unet_strength", "text_encoder_strength", "direction_strength", "magnitude_strength")


@dataclass(frozen=True)
class MergeSpec:
    """Adapters and their strengths.

    Attributes:
        adapters: One adapter, or several as ``[(adapter, strength), ...]``, or none.
        strengths: How strongly all of them act.

    Raises:
        ValueError: If a strength is out of its limits.
    """

    adapters: Adapters
    strengths: MergeStrengths = field(default_factory=MergeStrengths)

    def __post_init__(self) -> None:
        for path, strength in self.pairs():
            require_strength(f"the strength of {path}", strength)

    def require_adapter(self) -> None:
        """Refuse to do without any.

        Raises:
            ExportError: If there is none.
        """
        if not self.pairs():
            raise ExportError("no adapter was given")

    def pairs(self) -> list[tuple[str | Path, float]]:
        """The adapters with their own strengths."""
        if isinstance(self.adapters, (str, Path)):
            return [(self.adapters, 1.0)]
        return list(self.adapters)

    def knobs(self) -> dict[str, float]:
        """The strengths that act on all adapters, but the plain one."""
        return {name: getattr(self.strengths, name) for name in _KNOBS}

    def read(self, base: ModelWeights, alpha: float | None = None) -> list[AdapterFile]:
        """Read the adapters for a base, in their order.

        Args:
            base: The model that they are merged into.
            alpha: What those adapters were trained with whose files do not say it.

        Raises:
            AdapterFormatError: If one cannot be read, or does not fit the base.
            ExportError: If an alpha is given, and every file says its own.

        Warns:
            UserWarning: Of strengths that act on nothing that these adapters hold.
        """
        adapters = [read_adapter(path, base, sums=True) for path, _ in self.pairs()]
        if alpha is not None and adapters:
            if not any(adapter.lacks_alpha for adapter in adapters):
                raise ExportError(f"alpha {alpha:g} has no effect: every adapter says its own")
            adapters = [
                read_adapter(path, base, alpha=alpha, sums=True) if adapter.lacks_alpha else adapter
                for adapter, (path, _) in zip(adapters, self.pairs(), strict=True)
            ]
        layers = [
            layer
            for adapter in adapters
            for part in (adapter.layers, adapter.beside)
            for layer in part.items()
        ]
        reasons = self._without_effect(layers) if adapters else self._without_adapter(alpha)
        for reason in reasons:
            warnings.warn(reason, stacklevel=3)
        return adapters

    def _without_effect(self, layers: Sequence[tuple[str, LayerWeights]]) -> list[str]:
        """Strengths other than 1 that act on nothing, with the reason."""
        acts_on = {
            "unet_strength": (any(n.startswith("unet.") for n, _ in layers), "layer of a UNet"),
            "text_encoder_strength": (
                any(n.startswith("text_encoder") for n, _ in layers),
                "layer of a text encoder",
            ),
            "magnitude_strength": (any(w.magnitude is not None for _, w in layers), "magnitude"),
        }
        return [
            f"{name} has no effect because no adapter holds a {what}"
            for name, (is_there, what) in acts_on.items()
            if getattr(self.strengths, name) != 1 and not is_there
        ]

    def _without_adapter(self, alpha: float | None) -> list[str]:
        """All that acts on nothing where there is no adapter."""
        moved = [name for name, value in vars(self.strengths).items() if value != 1]
        moved += ["alpha"] * (alpha is not None)
        return [f"{name} has no effect because no adapter is given" for name in moved]

    def assumptions(self, adapters: Sequence[AdapterFile]) -> list[str]:
        """Return the assumptions about adapters that `read` gave, a line each, with their file."""
        names = [find_adapter(path).name for path, _ in self.pairs()]
        return [
            f"{name}: {assumption}"
            for name, adapter in zip(names, adapters, strict=True)
            for assumption in adapter.assumptions
        ]

    def embeddings(
        self, adapters: Sequence[AdapterFile], model: Path, output: Path
    ) -> list[tuple[Path, str, Vectors]]:
        """File, token and vectors of the base's own, and of each adapter that `read` gave.

        Warns:
            UserWarning: Of a token that several have with vectors of their own.
        """
        folder = output.parent if output.suffix == ".safetensors" else output
        named = [
            (find_adapter(path).stem, adapter.tokens)
            for adapter, (path, _) in zip(adapters, self.pairs(), strict=True)
        ]
        stems: Counter[str] = Counter()
        found: list[tuple[Path, str, Vectors]] = []
        for stem, tokens in [(model.stem, read_tokens(model)), *named]:
            stems[stem] += 1
            number = f"_{stems[stem]}" if stems[stem] > 1 else ""
            files = embedding_files(folder, stem + number, tokens)
            found += [(file, token, tokens[token]) for token, file in files.items()]
        found.sort(key=lambda each: each[0].name)  # The last is what `read_tokens` ends with.
        last = {token: (file, vectors) for file, token, vectors in found}
        for file, token, vectors in found:
            if not are_equal(vectors, last[token][1]):
                warnings.warn(
                    f"{token} has vectors of its own in {file.name} and {last[token][0].name}: "
                    "here it means the latter; other programs call each by its file's name",
                    stacklevel=3,
                )
        return found

    def weighted(self, adapters: Sequence[AdapterFile]) -> list[WeightedAdapter]:
        """The adapters that `read` gave, with the strengths of each component."""
        all_of = self.strengths
        shares = ((True, all_of.unet_strength), (False, all_of.text_encoder_strength))
        weighted = []
        for adapter, (_, strength) in zip(adapters, self.pairs(), strict=True):
            for part, (is_unet, share) in product((adapter.layers, adapter.beside), shares):
                layers = {n: w for n, w in part.items() if n.startswith("unet.") == is_unet}
                total = strength * all_of.strength * share
                strengths = Strengths(total, all_of.direction_strength, all_of.magnitude_strength)
                weighted.append(WeightedAdapter(layers, strengths))
        return [adapter for adapter in weighted if adapter.layers]

    def record(self) -> list[dict[str, object]]:
        """Record the merge: names and hashes, no paths; strengths other than 1 that act on all."""
        knobs = {name: value for name, value in self.knobs().items() if value != 1.0}
        return [
            {
                "adapter": without_path(str(Path(path).resolve())),
                "sha256": adapter_hash(path),
                "strength": strength * self.strengths.strength,
                **knobs,
            }
            for path, strength in self.pairs()
        ]


def recorded(text: str) -> dict[str, list[float]]:
    """Strengths by adapter hash, from the record in a merged model's metadata.

    For each, all strengths in the order strength, UNet, text encoders, direction, magnitude.
    """
    names = ("strength", *_KNOBS)
    try:
        items = json.loads(text) if text else []
        return {item["sha256"]: [float(item.get(n, 1.0)) for n in names] for item in items}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def adapter_hash(path: str | Path) -> str:
    """SHA-256 of an adapter's file; of a PEFT folder, of its components' files in order."""
    adapter = find_adapter(path)
    return file_hash(sorted(adapter.rglob(PEFT_FILE)) if adapter.is_dir() else [adapter])


def file_hash(files: Sequence[Path]) -> str:
    """SHA-256 of one file, or of several one after the other."""
    if len(files) == 1 and (known := _hub_hash(files[0])):
        return known
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    return digest.hexdigest()


def _hub_hash(file: Path) -> str | None:
    """The hub's cache names large files by their SHA-256."""
    blob = file.resolve()
    is_hash = re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.parent.name == "blobs"
    return blob.name if is_hash else None
