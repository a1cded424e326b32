"""Adapters and strengths of a merge into a model, and the record of it in the output."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from itertools import product
from os import PathLike
from pathlib import Path

from dora_diffusion.config.families import DENOISERS
from dora_diffusion.export.files import ExportError
from dora_diffusion.formats.adapter.embeddings import (
    Vectors,
    are_equal,
    embedding_files,
    read_tokens,
)
from dora_diffusion.formats.adapter.file import AdapterFile, read_adapter
from dora_diffusion.formats.adapter.metadata import without_path
from dora_diffusion.formats.adapter.stored import adapter_hash, find_adapter
from dora_diffusion.formats.checkpoint.weights import ModelWeights
from dora_diffusion.numerics.merging import WeightedAdapter
from dora_diffusion.numerics.weights import MergeStrengths, Strengths, require_strength

Adapters = str | PathLike[str] | Sequence[tuple[str | PathLike[str], float]]
_KNOBS = ("unet_strength", "text_encoder_strength", "direction_strength", "magnitude_strength")


@dataclass
class MergeSpec:
    """Adapters and strengths of a merge.

    Attributes:
        adapters: One adapter, or several as ``[(adapter, strength), ...]``, or none.
        strengths: Strengths that apply to all adapters.
        pairs: The adapters with their strengths.
        parts: File, strength and content of each adapter; empty before `read`.

    Raises:
        ValueError: If a strength is out of range.
    """

    adapters: InitVar[Adapters]
    strengths: MergeStrengths = field(default_factory=MergeStrengths)
    pairs: list[tuple[Path, float]] = field(init=False)
    parts: list[tuple[Path, float, AdapterFile]] = field(default_factory=list, init=False)

    def __post_init__(self, adapters: Adapters) -> None:
        pairs = [(adapters, 1.0)] if isinstance(adapters, (str, PathLike)) else adapters
        self.pairs = [(Path(path), strength) for path, strength in pairs]
        for path, strength in self.pairs:
            require_strength(f"the strength of {path}", strength)

    def require_adapter(self) -> None:
        """Check that there is an adapter.

        Raises:
            ExportError: If there is none.
        """
        if not self.pairs:
            raise ExportError("no adapter was given")

    def files(self) -> list[Path]:
        """Return the adapters' files, in order."""
        return [find_adapter(path) for path, _ in self.pairs]

    def knobs(self) -> dict[str, float]:
        """Return the strengths that apply to all adapters, except ``strength``."""
        return {name: getattr(self.strengths, name) for name in _KNOBS}

    def read(self, base: ModelWeights, alpha: float | None = None) -> list[AdapterFile]:
        """Read the adapters for a base, in order.

        Args:
            base: The model to merge into.
            alpha: Alpha of adapters whose files do not store it.

        Raises:
            AdapterFormatError: If an adapter cannot be read, or does not fit the base.
            ExportError: If an alpha is given, but every file stores one.

        Warns:
            UserWarning: If a strength has no effect on these adapters.
        """
        files = self.files()
        adapters = [read_adapter(file, base, sums=True) for file in files]
        if alpha is not None and adapters:
            lacking = [number for number, adapter in enumerate(adapters) if adapter.lacks_alpha]
            if not lacking:
                raise ExportError(
                    f"alpha {alpha:g} has no effect: every adapter's file stores its alpha; leave "
                    "it out"
                )
            for number in lacking:
                adapters[number] = read_adapter(files[number], base, alpha=alpha, sums=True)
        self.parts = [(file, pair[1], adapter) for file, pair, adapter in
                      zip(files, self.pairs, adapters, strict=True)]  # fmt: skip
        if not adapters and alpha is not None:
            warnings.warn("alpha has no effect because no adapter is given", stacklevel=3)
        for name, reason in self._without_effect().items():
            if getattr(self.strengths, name) != 1:
                warnings.warn(f"{name} has no effect because {reason}", stacklevel=3)
        return adapters

    def _without_effect(self) -> dict[str, str]:
        """Return the strengths without effect on these adapters, with the reason."""
        if not self.parts:
            return dict.fromkeys(vars(self.strengths), "no adapter is given")
        adapters = [adapter for *_, adapter in self.parts]
        layers = [one for part in adapters for one in (part.layers, part.beside)]
        names = {name.partition(".")[0] for group in layers for name in group}
        has_magnitude = any(w.magnitude is not None for group in layers for w in group.values())
        acts_on = (
            ("unet_strength", "layer of a denoiser", names & set(DENOISERS)),
            ("text_encoder_strength", "layer of a text encoder", names - set(DENOISERS)),
            ("magnitude_strength", "magnitude", has_magnitude),
        )
        return {name: f"no adapter has a {what}" for name, what, held in acts_on if not held}

    def assumptions(self) -> list[str]:
        """Return the assumptions about the adapters, one line each, with the file's name."""
        parts = self.parts
        return [f"{file.name}: {text}" for file, _, part in parts for text in part.assumptions]

    def warn_of_assumptions(self) -> None:
        for assumption in self.assumptions():
            warnings.warn(f"{assumption}; if it was another, give --alpha", stacklevel=3)

    def embeddings(self, model: Path, output: Path) -> list[tuple[Path, str, Vectors]]:
        """Return file, token and vectors for the tokens of the base and of each adapter.

        Warns:
            UserWarning: If several of them have different vectors for a token.
        """
        folder = output.parent if output.suffix == ".safetensors" else output
        named = [(file.stem, adapter.tokens) for file, _, adapter in self.parts]
        stems: Counter[str] = Counter()
        entries: list[tuple[Path, str, Vectors]] = []
        for stem, tokens in [(model.stem, read_tokens(model)), *named]:
            stems[stem] += 1
            number = f"_{stems[stem]}" if stems[stem] > 1 else ""
            files = embedding_files(folder, stem + number, tokens)
            entries += [(file, token, tokens[token]) for token, file in files.items()]
        entries.sort(key=lambda entry: entry[0].name)  # As in `read_tokens`, the last one counts.
        last = {token: (file, vectors) for file, token, vectors in entries}
        for file, token, vectors in entries:
            if not are_equal(vectors, last[token][1]):
                warnings.warn(
                    f"{token} has different vectors in {file.name} and {last[token][0].name}: "
                    "here it means the latter; other programs call each by its file's name",
                    stacklevel=3,
                )
        return entries

    def weighted(self) -> list[WeightedAdapter]:
        """Return the adapters with the strengths of each component."""
        all_of, weighted = self.strengths, []
        shares = ((True, all_of.unet_strength), (False, all_of.text_encoder_strength))
        for _, strength, adapter in self.parts:
            for part, (is_denoiser, share) in product((adapter.layers, adapter.beside), shares):
                layers = {
                    n: w
                    for n, w in part.items()
                    if (n.partition(".")[0] in DENOISERS) == is_denoiser
                }
                total = strength * all_of.strength * share
                strengths = Strengths(total, all_of.direction_strength, all_of.magnitude_strength)
                weighted.append(WeightedAdapter(layers, strengths))
        return [adapter for adapter in weighted if adapter.layers]

    def record(self) -> list[dict[str, object]]:
        """Return a record of the merge: names, hashes and strengths, without paths."""
        knobs = {name: value for name, value in self.knobs().items() if value != 1.0}
        rows = list[dict[str, object]]()
        for path, strength in self.pairs:
            row = {"adapter": without_path(str(Path(path).resolve())), "sha256": adapter_hash(path)}
            rows.append({**row, "strength": strength * self.strengths.strength, **knobs})
        return rows


def recorded(text: str) -> list[tuple[str, str, list[float]]]:
    """Return name, hash and strengths of each adapter in the record of a merged model.

    The order of strengths is: strength, UNet, text encoders, direction, magnitude. A record that is
    damaged or from another program gives an empty list.
    """
    names = ("strength", *_KNOBS)
    try:
        return [
            (str(row["adapter"]), row["sha256"], [float(row.get(name, 1)) for name in names])
            for row in json.loads(text or "[]")
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
