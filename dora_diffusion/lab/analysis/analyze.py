"""Compare tuned weights with those of the base, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from dora_diffusion.config.base import AnyModel, BaseModel
from dora_diffusion.config.wording import listing
from dora_diffusion.export.files import ExportError, model_name, open_model
from dora_diffusion.formats.checkpoint.weights import StoredModel, module_weight
from dora_diffusion.lab.analysis.changes import (
    LEADING,
    CheckpointChange,
    LayerChange,
    RunChange,
    Spectrum,
    is_table,
    model_order,
)
from dora_diffusion.lab.analysis.report import Analysis
from dora_diffusion.lab.analysis.sources import SavedRun, TunedWeights, find_run, open_tuned
from dora_diffusion.numerics.decomposition import (
    decompose,
    effective_rank,
    low_rank_singular_values,
    singular_values,
)
from dora_diffusion.numerics.weights import NORM_AXES, NormAxis, oriented

# Layers that are done, and of all.
Progress = Callable[[int, int], None]


def analyze_weights(
    sources: str | Path | Sequence[str | Path],
    base: AnyModel,
    *,
    norm_axis: NormAxis = "output",
    layers: Sequence[str] = ("*",),
    alpha: float | None = None,
    on_progress: Progress | None = None,
) -> Analysis:
    """Analyze how training changed a model's weights, as section 3.2 of the DoRA paper does.

    Per layer and checkpoint: how far magnitude and direction of its channels moved, singular values
    and effective rank of its change; over layers, the correlation of magnitude and direction, and
    the share of each part of the model. One weight is in memory at a time.

    Args:
        sources: One or several, to be compared: the output folder of a run (all its checkpoints),
            an adapter, or a model that was trained from the base or merged.
        base: The model before training: a Diffusers folder, a hub id, ``embedded:NAME`` or a
            single-file checkpoint; or one of these as a `BaseModel`.
        norm_axis: What a channel is: ``"output"`` or ``"input"``, whatever an adapter's own is.
        layers: Patterns of canonical layer names, such as ``"*.to_q"``; ``*`` spans dots.
        alpha: What an adapter was trained with whose file does not say it.
        on_progress: Called with the numbers of layers that are done, and of all.

    Raises:
        ExportError: If nothing was given, a model was not trained from this base, or no changed
            layer is left.
        AdapterFormatError: If an adapter cannot be read, or does not fit the base.
        MergeError: If a layer is stored in 8 bits or less.

    Example:
        >>> analyze_weights("embedded:tiny-sd", base="embedded:tiny-sd")
        Traceback (most recent call last):
            ...
        dora_diffusion.export.files.ExportError: embedded:tiny-sd: no layer differs from the base's
    """
    paths = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not paths:
        raise ExportError("no run, adapter or model to analyze was given")
    if norm_axis not in NORM_AXES:
        raise ExportError(f"norm_axis is {norm_axis!r}; it must be one of {', '.join(NORM_AXES)}")
    found = [find_run(path) for path in paths]
    names = [source.name for source in found]
    left = sum(len(source.checkpoints) for source in found)
    with open_model(base) as model:
        analyzer = _Analyzer(model, norm_axis, layers, alpha, _Counter(left, on_progress))
        runs = [
            analyzer.run(source, source.name if names.count(source.name) == 1 else str(path))
            for path, source in zip(paths, found, strict=True)
        ]
        path = BaseModel.of(base).path
        name = model_name(model.path) if Path(path).exists() else str(path)
    return Analysis(name, norm_axis, tuple(layers), runs)


@dataclass
class _Counter:
    """Counts layers, of which the checkpoints that are not open yet are taken to have as many."""

    checkpoints: int
    report: Progress | None
    done: int = 0
    total: int = 0

    def open(self, layers: int) -> None:
        self.total = self.done + self.checkpoints * layers
        self.checkpoints -= 1

    def __call__(self) -> None:
        self.done += 1
        if self.report is not None:
            self.report(self.done, self.total)


@dataclass(frozen=True)
class _Analyzer:
    """Analyzer of checkpoints beside one base."""

    base: StoredModel
    axis: NormAxis
    patterns: Sequence[str]
    alpha: float | None
    count: _Counter

    def run(self, source: SavedRun, name: str) -> RunChange:
        checkpoints: list[CheckpointChange] = []
        notes: list[str] = []
        for step, path in source.checkpoints:
            with open_tuned(path, self.base, self.alpha) as tuned:
                change = self._checkpoint(tuned, name, step)
                notes += tuned.notes
            if change.layers:
                checkpoints.append(change)
            else:
                notes.append(f"{change.label}: no layer differs from the base's")
        if not checkpoints:
            raise ExportError(f"{name}: no layer differs from the base's")
        return RunChange(name, checkpoints, tuple(dict.fromkeys(notes)))

    def _checkpoint(self, tuned: TunedWeights, run: str, step: int | None) -> CheckpointChange:
        names = [n for n in tuned.names if any(fnmatchcase(n, p) for p in self.patterns)]
        if not names:
            raise ExportError(
                f"{run}: no layer is called {' or '.join(self.patterns)}; it has "
                f"{listing(tuned.names, 3)}"
            )
        self.count.open(len(names))
        changes = [self._layer(tuned, name) for name in sorted(names, key=model_order)]
        layers = [change for change in changes if change is not None]
        return CheckpointChange(
            step, tuned.method, layers, len(names) - len(layers), tuned.other_changes(self.base)
        )

    def _layer(self, tuned: TunedWeights, name: str) -> LayerChange | None:
        """The change of a layer; None where there is none."""
        base = module_weight(self.base, name)
        weight, factors = tuned.weight(name, base), tuned.factors(name)
        self.count()
        if is_table(name):
            # As its adapters see it: an output is a dimension of its vectors, an input a row.
            base, weight = oriented(base, "embedding"), oriented(weight, "embedding")
        parts = decompose(base, weight, self.axis)
        if not parts.squared_change:
            return None
        low_rank = None if factors is None else low_rank_singular_values(factors)
        if factors is not None and factors.magnitude is None and low_rank is not None:
            return LayerChange(name, tuple(base.shape), parts, _spectrum(low_rank))
        update = _spectrum(singular_values(base, weight))
        inner = None if low_rank is None else _spectrum(low_rank)
        return LayerChange(name, tuple(base.shape), parts, update, inner)


def _spectrum(values: Tensor) -> Spectrum:
    return Spectrum(tuple(values[:LEADING].tolist()), effective_rank(values))
